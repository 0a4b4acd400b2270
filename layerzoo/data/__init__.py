"""Tasks: one file per family; each is a LightningDataModule (see `layerzoo.data.task.Task`)."""

from layerzoo.data.continual import Continual
from layerzoo.data.mqar import MQAR
from layerzoo.data.overwrite import Overwrite
from layerzoo.data.recall import RecallTask
from layerzoo.data.task import Task, list_tasks
from layerzoo.data.text import Text

__all__ = ["MQAR", "Continual", "Overwrite", "RecallTask", "Task", "Text", "list_tasks"]
