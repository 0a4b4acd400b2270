"""torchmetrics metrics of sequence models; each name says its definition.

Every metric is updated with the logits and labels of the labelled positions, `[N, vocab]` and
`[N]`, and the task's annotations at the same positions, and computes a dict of scalars. Counts
and sums are its states, so that the figures of several processes are those of one.

A scalar `family/number` is a point of the curve `family`; see `layerzoo.tables`.
"""

from layerzoo.metrics.accuracy import Accuracy, AccuracyBy, Capacity, SuccessRate
from layerzoo.metrics.binned import Binned
from layerzoo.metrics.continual import ContinualMatrix
from layerzoo.metrics.loss import LossByPosition, TokenLoss
from layerzoo.metrics.needle import Answers, MarkedAnswers
from layerzoo.metrics.overwrite import Collateral, ErrorKinds
from layerzoo.metrics.recall import Recall, RecallByLag

__all__ = [
    "Accuracy",
    "AccuracyBy",
    "Answers",
    "Binned",
    "Capacity",
    "Collateral",
    "ContinualMatrix",
    "ErrorKinds",
    "LossByPosition",
    "MarkedAnswers",
    "Recall",
    "RecallByLag",
    "SuccessRate",
    "TokenLoss",
]
