"""Tasks: one file per family; each is a LightningDataModule (see `layerzoo.data.task.Task`)."""

from layerzoo.data.continual import Continual
from layerzoo.data.copying import Copying, Induction
from layerzoo.data.mad import Memorization, SelectiveCopying
from layerzoo.data.mad_compression import Compression
from layerzoo.data.mad_recall import FuzzyRecall, InContextRecall, NoisyRecall
from layerzoo.data.mqar import MQAR
from layerzoo.data.needle import Needle
from layerzoo.data.overwrite import Overwrite
from layerzoo.data.recall import RecallTask
from layerzoo.data.recall_text import RecallText
from layerzoo.data.state_tracking import StateTracking
from layerzoo.data.task import Task, list_tasks
from layerzoo.data.text import Text
from layerzoo.data.tracking import VariableTracking
from layerzoo.data.words import CommonWords, FrequentWords

__all__ = [
    "MQAR",
    "CommonWords",
    "Compression",
    "Continual",
    "Copying",
    "FrequentWords",
    "FuzzyRecall",
    "InContextRecall",
    "Induction",
    "Memorization",
    "Needle",
    "NoisyRecall",
    "Overwrite",
    "RecallTask",
    "RecallText",
    "SelectiveCopying",
    "StateTracking",
    "Task",
    "Text",
    "VariableTracking",
    "list_tasks",
]
