"""The parts of training on a whole model: what is trained, the objective, and how steps are taken.

They are for the stage ``Train`` what :mod:`lowbit.steps` is for ``Blockwise``: frozen values that do the work.
:mod:`lowbit.stages.descent` is the loop that joins them.
"""

from lowbit.training.curve import Curve, Row, draw_curve
from lowbit.training.latent_signs import LatentSigns
from lowbit.training.latent_weights import LatentWeights
from lowbit.training.objectives import (
    Answer,
    Batch,
    ConfidenceKL,
    HiddenStates,
    NextToken,
    Objective,
    OriginalKL,
    ReverseKL,
    Text,
)
from lowbit.training.optimizers import AdamW, CayleySGD, Cosine, OneCycle, Optimizer, Schedule
from lowbit.training.pieces import loss_in_pieces
from lowbit.training.processes import Processes, launched, leads
from lowbit.training.recompute import recomputed, replaced
from lowbit.training.rotations import LearnedRotations, RotatedModel, Rotations
from lowbit.training.side_terms import KeptColumnValues, LowRankTerms
from lowbit.training.stored_answers import StoredAnswers
from lowbit.training.stored_floats import StoredFloats
from lowbit.training.trainable import Group, OriginalBlock, Parameters, Start, Trainable
from lowbit.training.trained_linear import DecodedProduct, TrainedLinear, TrainedModel

__all__ = [
    "AdamW",
    "Answer",
    "Batch",
    "CayleySGD",
    "ConfidenceKL",
    "Cosine",
    "Curve",
    "DecodedProduct",
    "Group",
    "HiddenStates",
    "KeptColumnValues",
    "LatentSigns",
    "LatentWeights",
    "LearnedRotations",
    "LowRankTerms",
    "NextToken",
    "Objective",
    "OneCycle",
    "Optimizer",
    "OriginalBlock",
    "OriginalKL",
    "Parameters",
    "Processes",
    "ReverseKL",
    "RotatedModel",
    "Rotations",
    "Row",
    "Schedule",
    "Start",
    "StoredAnswers",
    "StoredFloats",
    "Text",
    "Trainable",
    "TrainedLinear",
    "TrainedModel",
    "draw_curve",
    "launched",
    "leads",
    "loss_in_pieces",
    "recomputed",
    "replaced",
]
