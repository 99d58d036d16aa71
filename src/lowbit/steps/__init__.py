"""Steps: how what is free gets set. The stage Blockwise is a tuple of them; each runs on one block at a time."""

from typing import Protocol, runtime_checkable

from lowbit.numerics import Statistic
from lowbit.steps.attention import SetAttentionRange
from lowbit.steps.choose_grid import ChooseGrid, FitActivation
from lowbit.steps.cluster import Cluster
from lowbit.steps.correction import LowRankCorrection, NormsAndBiases
from lowbit.steps.incoherence import Incoherence
from lowbit.steps.learn import Learn
from lowbit.steps.objectives import BlockMSE
from lowbit.steps.parametrizations import AllWeights, ClipShares, Rounding, Scales, Shifts
from lowbit.steps.ranges import LearnedStepSizes, SearchActivationRange
from lowbit.steps.reassembly import SearchReassembly
from lowbit.steps.rotation import RotateInputs, RotateResidual
from lowbit.steps.rules import Balance, Midpoint, Ones, OwnGain, Smooth
from lowbit.steps.search import MeanAbsPower, Search, SearchClip, SmoothPowers, Thresholds
from lowbit.steps.search_float import SearchFloat
from lowbit.steps.set import Set, SetActivationRange
from lowbit.steps.solve import Solve
from lowbit.steps.state import BlockIO, BlockState, LayerRecord


@runtime_checkable
class Step(Protocol):
    """One step. ``needs``: the statistics of inputs that it will ask for."""

    @property
    def needs(self) -> frozenset[Statistic]: ...

    def ticks(self, windows: int, linears: int) -> int:
        """About how often a run on a block of so many linears will tick: for the time that is left, nothing else."""
        ...

    def run(self, state: BlockState) -> None: ...


__all__ = [
    "AllWeights",
    "Balance",
    "BlockIO",
    "BlockMSE",
    "BlockState",
    "ChooseGrid",
    "ClipShares",
    "Cluster",
    "FitActivation",
    "Incoherence",
    "LayerRecord",
    "Learn",
    "LearnedStepSizes",
    "LowRankCorrection",
    "MeanAbsPower",
    "Midpoint",
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
    "Thresholds",
]
