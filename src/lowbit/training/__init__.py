"""The parts of training on a whole model: what is trained, towards what, and how steps are taken.

They are to the stage ``Train`` what :mod:`lowbit.steps` are to ``Blockwise``: frozen values that do the work. The loop that
joins them is :mod:`lowbit.stages.train`.
"""

from lowbit.training.objectives import Batch, Objective, OriginalKL
from lowbit.training.optimizers import AdamW, OneCycle
from lowbit.training.stored_floats import StoredFloats
from lowbit.training.trainable import Parameters, Trainable

__all__ = [
    "AdamW",
    "Batch",
    "Objective",
    "OneCycle",
    "OriginalKL",
    "Parameters",
    "StoredFloats",
    "Trainable",
]
