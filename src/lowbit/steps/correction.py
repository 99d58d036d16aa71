"""Learned corrections of rounding errors: low-rank terms, norms and biases."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.modules import serialize_transforms
from lowbit.numerics import LowRank, serializable
from lowbit.steps.effects import BlockDescription, Freedom, LayerDescription
from lowbit.steps.parametrizations import Differences, Maker, Parametrization, Weights
from lowbit.steps.state import BlockState, Stats


class _LowRank(Parametrization):
    """A correction ``B A / r`` for every linear. A starts uniform, like a new linear layer, and B at zero."""

    def __init__(self, state: BlockState, rank: int, fold: bool):
        super().__init__()
        self.drafts, self.fold = state.drafts, fold
        generator = torch.Generator().manual_seed(state.seed)
        self.a, self.b = nn.ParameterList(), nn.ParameterList()
        for draft in self.drafts.values():
            rows, columns = draft.weight.shape
            r = min(rank, rows, columns)
            uniform = torch.rand(r, columns, generator=generator) * 2 - 1
            self.a.append(nn.Parameter(uniform * columns**-0.5))
            self.b.append(nn.Parameter(torch.zeros(rows, r)))

    def factors(self, path: str) -> tuple[Tensor, Tensor]:
        """``a`` ``[R, I]`` and ``b`` ``[O, R]``. The correction is ``b @ a``."""
        i = list(self.drafts).index(path)
        return self.a[i], self.b[i] / self.b[i].shape[1]

    def chosen(self, path: str, w_OI: Tensor) -> dict[str, Any]:
        return {} if self.fold else {"side_terms": (*self.drafts[path].side_terms, LowRank(*self.factors(path)))}

    def forward(self, weights: Weights) -> Weights:
        return {**weights, **{f"{path}.weight": self._moved(path, weights) for path in self.drafts if self.fold}}

    def _moved(self, path: str, weights: Weights) -> Tensor:
        a_RI, b_OR = self.factors(path)
        return weights[f"{path}.weight"] + b_OR @ a_RI

    @torch.no_grad()
    def commit(self, state: BlockState) -> None:
        for path, draft in self.drafts.items():
            a_RI, b_OR = self.factors(path)
            if self.fold:
                draft.weight.add_(b_OR @ a_RI)
            else:
                draft.side_terms = (*draft.side_terms, LowRank.of(a_RI, b_OR))
        where = "added to the weights before these were rounded" if self.fold else "kept next to the codes, in float16"
        state.note(f"low-rank corrections are {where}")


@serializable
@dataclass(frozen=True)
class LowRankCorrection(Maker):
    """A correction ``B A`` of ``rank`` for every linear (QLLM, arXiv:2310.08041, section 4.3).

    Without ``fold`` the layer stores it in float16: ``16 rank (in + out)`` bits, applied to the input before the input
    is quantized. With ``fold`` it is added to the weight, which is then rounded; it is learned that way too, straight
    through the rounding. (The authors learn it next to the rounded weight and fold it afterwards, which loses changes
    below half a step.)
    """

    rank: int = 4
    lr: float = 5e-4
    fold: bool = False

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"a correction has a rank of 1 or more, found {self.rank}")

    @property
    def fixes(self) -> frozenset[Freedom]:
        return frozenset() if self.fold else frozenset({Freedom.CORRECTIONS})

    def describe(self, block: BlockDescription) -> BlockDescription:
        return block if self.fold else block.changed({p: self._corrected(layer) for p, layer in block.layers.items()})

    def _corrected(self, layer: LayerDescription) -> LayerDescription:
        rows, columns = layer.shape
        rank, half = min(self.rank, rows, columns), torch.zeros((), dtype=torch.float16)
        term = LowRank(half.expand(rank, columns), half.expand(rows, rank))
        return replace(layer, side_terms=(*layer.side_terms, *serialize_transforms.describe("side", [term])))

    def make(self, state: BlockState, stats: dict[str, Stats]) -> Parametrization:
        return _LowRank(state, self.rank, self.fold)


@serializable
@dataclass(frozen=True)
class NormsAndBiases(Maker):
    """The gains of norms and all biases of the block. They are stored unquantized, so learning them costs no bits."""

    lr: float = 5e-4

    def make(self, state: BlockState, stats: dict[str, Stats]) -> Parametrization:
        return Differences(state.block, lambda parameter: parameter.dim() == 1)
