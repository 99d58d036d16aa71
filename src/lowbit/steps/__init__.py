"""Steps: each makes one kind of decision about a block. The stage Blockwise runs a tuple of them, block after block."""

from lowbit.steps.attention import SetAttentionRange
from lowbit.steps.block_io import Ahead, BlockIO
from lowbit.steps.cache_coordinates import CacheCoordinates
from lowbit.steps.choose_grid import ChooseGrid, FitActivation
from lowbit.steps.cluster import Cluster
from lowbit.steps.correction import LowRankCorrection, NormsAndBiases
from lowbit.steps.effects import BlockDescription, EdgeUse, Effects, Freedom, LayerDescription, MixOrder
from lowbit.steps.incoherence import Incoherence
from lowbit.steps.learn import Learn
from lowbit.steps.objectives import BlockMSE, CrossBlockMAE, TokenMSE
from lowbit.steps.parametrizations import AllWeights, ClipShares, Rounding, Scales, Shifts, StepSizes
from lowbit.steps.ranges import LearnedStepSizes, SearchActivationRange
from lowbit.steps.reassembly import SearchReassembly
from lowbit.steps.rotation import (
    RotateInputs,
    RotateResidual,
    drawn_heads,
    drawn_input,
    drawn_residual,
    folded_heads,
    rotated_at_run_time,
)
from lowbit.steps.rules import Balance, Midpoint, Ones, OwnGain, Smooth
from lowbit.steps.search import MeanAbsPower, Search, SmoothPowers, Thresholds
from lowbit.steps.search_clip import SearchClip
from lowbit.steps.search_float import SearchFloat
from lowbit.steps.set import Set, SetActivationRange
from lowbit.steps.solve import Solve
from lowbit.steps.state import BlockState, LayerRecord
from lowbit.steps.step import Step

__all__ = [
    "Ahead",
    "AllWeights",
    "Balance",
    "BlockDescription",
    "BlockIO",
    "BlockMSE",
    "BlockState",
    "CacheCoordinates",
    "ChooseGrid",
    "ClipShares",
    "Cluster",
    "CrossBlockMAE",
    "EdgeUse",
    "Effects",
    "FitActivation",
    "Freedom",
    "Incoherence",
    "LayerDescription",
    "LayerRecord",
    "Learn",
    "LearnedStepSizes",
    "LowRankCorrection",
    "MeanAbsPower",
    "Midpoint",
    "MixOrder",
    "NormsAndBiases",
    "Ones",
    "OwnGain",
    "RotateInputs",
    "RotateResidual",
    "Rounding",
    "Scales",
    "Search",
    "SearchActivationRange",
    "SearchClip",
    "SearchFloat",
    "SearchReassembly",
    "Set",
    "SetActivationRange",
    "SetAttentionRange",
    "Shifts",
    "Smooth",
    "SmoothPowers",
    "Solve",
    "Step",
    "StepSizes",
    "Thresholds",
    "TokenMSE",
    "drawn_heads",
    "drawn_input",
    "drawn_residual",
    "folded_heads",
    "rotated_at_run_time",
]
