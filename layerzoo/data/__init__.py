"""Tasks: one file per family; each is a LightningDataModule (see `layerzoo.data.task.Task`)."""

from layerzoo.data.copying import Copying, Induction
from layerzoo.data.mqar import MQAR
from layerzoo.data.needle import Needle
from layerzoo.data.overwrite import Overwrite
from layerzoo.data.recall import RecallTask
from layerzoo.data.state_tracking import StateTracking
from layerzoo.data.task import Task, list_tasks
from layerzoo.data.text import Text
from layerzoo.data.tracking import VariableTracking
from layerzoo.data.words import CommonWords, FrequentWords

__all__ = [
    "MQAR",
    "CommonWords",
    "Copying",
    "FrequentWords",
    "Induction",
    "Needle",
    "Overwrite",
    "RecallTask",
    "StateTracking",
    "Task",
    "Text",
    "VariableTracking",
    "list_tasks",
]
