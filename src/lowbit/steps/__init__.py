"""Steps: how what is free gets set. A recipe is a tuple of them; each runs on one block at a time."""

from typing import Protocol, runtime_checkable

from lowbit.numerics import Statistic
from lowbit.steps.cluster import Cluster
from lowbit.steps.incoherence import Incoherence
from lowbit.steps.learn import Learn
from lowbit.steps.objectives import BlockMSE
from lowbit.steps.parametrizations import AllWeights, ClipShares, Rounding, Scales, Shifts
from lowbit.steps.rules import Balance, Midpoint, Ones, Smooth
from lowbit.steps.search import MeanAbsPower, Search, SearchClip
from lowbit.steps.set import Set, SetActivationRange
from lowbit.steps.solve import Solve
from lowbit.steps.state import BlockIO, BlockState, LayerRecord, LinearFormat
from lowbit.steps.tune import ModelState, Tune


@runtime_checkable
class Step(Protocol):
    """One stage of a recipe. ``needs``: the statistics of inputs that it will ask for."""

    @property
    def needs(self) -> frozenset[Statistic]: ...

    def ticks(self, windows: int, linears: int) -> int:
        """About how often a run on a block of so many linears will tick: for the time that is left, nothing else."""
        ...

    def run(self, state: BlockState) -> None: ...


@runtime_checkable
class ModelStep(Protocol):
    """What is done to the whole packed model after its last block."""

    def model_ticks(self, windows: int) -> int:
        """How often a run will tick."""
        ...

    def run_model(self, state: ModelState) -> None: ...


__all__ = [
    "AllWeights",
    "Balance",
    "BlockIO",
    "BlockMSE",
    "BlockState",
    "ClipShares",
    "Cluster",
    "Incoherence",
    "LayerRecord",
    "Learn",
    "LinearFormat",
    "MeanAbsPower",
    "Midpoint",
    "ModelState",
    "ModelStep",
    "Ones",
    "Rounding",
    "Scales",
    "Search",
    "SearchClip",
    "Set",
    "SetActivationRange",
    "Shifts",
    "Smooth",
    "Solve",
    "Step",
    "Tune",
]
