"""Tasks: one file per family; each is a LightningDataModule (see `layerzoo.data.task.Task`)."""

from layerzoo.data.mqar import MQAR
from layerzoo.data.task import Task
from layerzoo.data.text import Text

__all__ = ["MQAR", "Task", "Text"]
