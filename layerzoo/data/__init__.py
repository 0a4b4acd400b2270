"""Tasks: one file per family; each is a LightningDataModule (see `layerzoo.data.task.Task`)."""

from layerzoo.data.copying import Copying, Induction
from layerzoo.data.mqar import MQAR
from layerzoo.data.recall import RecallTask
from layerzoo.data.state_tracking import StateTracking
from layerzoo.data.task import Task, list_tasks
from layerzoo.data.text import Text

__all__ = [
    "MQAR",
    "Copying",
    "Induction",
    "RecallTask",
    "StateTracking",
    "Task",
    "Text",
    "list_tasks",
]
