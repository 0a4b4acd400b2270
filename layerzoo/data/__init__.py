"""Tasks: one file per family; each is a LightningDataModule (see `layerzoo.data.task.Task`)."""

from layerzoo.data.mqar import MQAR
from layerzoo.data.needle import Needle
from layerzoo.data.overwrite import Overwrite
from layerzoo.data.recall import RecallTask
from layerzoo.data.task import Task, list_tasks
from layerzoo.data.text import Text

__all__ = ["MQAR", "Needle", "Overwrite", "RecallTask", "Task", "Text", "list_tasks"]
