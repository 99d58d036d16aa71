"""The parts of training on a whole model: what is trained, the objective, and how steps are taken.

They are for the stage ``Train`` what :mod:`lowbit.steps` is for ``Blockwise``: frozen values that do the work.
:mod:`lowbit.stages.train` is the loop that joins them.
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
