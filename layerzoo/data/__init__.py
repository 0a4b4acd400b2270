"""Tasks: one file per family; each is a LightningDataModule (see `layerzoo.data.task.Task`)."""

from layerzoo.data.mad import Memorization, SelectiveCopying
from layerzoo.data.mad_compression import Compression
from layerzoo.data.mad_recall import FuzzyRecall, InContextRecall, NoisyRecall
from layerzoo.data.mqar import MQAR
from layerzoo.data.recall import RecallTask
from layerzoo.data.task import Task, list_tasks
from layerzoo.data.text import Text

__all__ = [
    "MQAR",
    "Compression",
    "FuzzyRecall",
    "InContextRecall",
    "Memorization",
    "NoisyRecall",
    "RecallTask",
    "SelectiveCopying",
    "Task",
    "Text",
    "list_tasks",
]
