"""A low-rank term beside the codes of a weight, for training: ``W ~ decode(codes) + b a``, and where it starts.

Shapes: O output channel, I input channel behind the solver's own transforms, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lowbit.numerics import Clipped, Fixed, Gram, LowRank, Spec, Statistic, serializable
from lowbit.solve.base import Solution, Solver
from lowbit.transforms import ChannelTransform

_STARTS = ("zero", "residual", "calibrated")


@serializable
@dataclass(frozen=True)
class Adapter:
    """A term ``b a`` in float16 that stands beside the codes of a linear (LoRA, arXiv:2106.09685), and is there to be trained.

    Args:
        rank: rows of a and columns of b.
        start: ``"zero"``: b is zero and a is drawn, so the layer is what its codes say. ``"residual"``: the best of its rank for
            what rounding lost (LoftQ, arXiv:2310.08659). ``"calibrated"``: the best of its rank for what rounding costs the
            layer's outputs on the calibration text, in closed form (CLoQ, arXiv:2501.18475, theorem 3.1).
        rounds: of ``"residual"``: how often the weight is rounded anew without the term found so far.
        damp: of ``"calibrated"``: added to each eigenvalue of the Gram matrix, as a share of their mean.
        targets: roles of linears (``q``), groups of roles (``attention``) or patterns of their paths in a block; empty: all.

    b and a share the singular values evenly, which keeps both well inside float16.
    """

    rank: int = 16
    start: Literal["zero", "residual", "calibrated"] = "zero"
    rounds: int = 1
    damp: float = 0.01
    targets: tuple[str, ...] = ()

    def __post_init__(self):
        if self.rank < 1 or self.rounds < 1 or self.damp < 0:
            raise ValueError(f"an adapter has a rank and rounds of 1 or more and a damp of 0 or more, found {self}")
        if self.start not in _STARTS:
            raise ValueError(f"start is one of {', '.join(_STARTS)}, found {self.start!r}")
        if self.rounds > 1 and self.start != "residual":
            raise ValueError(
                f"rounds are of start='residual', found {self.rounds} of {self.start!r}; leave rounds out or choose residual"
            )

    @property
    def needs(self) -> frozenset[Statistic]:
        """Statistics of a layer's input that it reads."""
        return frozenset({Gram()} if self.start == "calibrated" else ())

    def memory(self, rows: int, columns: int) -> int:
        """Approximate bytes for finding the term of a weight of ``rows`` x ``columns``."""
        return 0 if self.start == "zero" else 4 * 4 * rows * columns + 4 * 8 * columns**2 * len(self.needs)

    def foreseen(self, shape: tuple[int, int]) -> LowRank:
        """The term of a weight of ``shape`` (O, I), with values that mean nothing."""
        half = torch.zeros((), dtype=torch.float16)
        return LowRank(half.expand(self.rank, shape[1]), half.expand(shape[0], self.rank))

    def solve(
        self,
        solver: Solver,
        w_OI: Tensor,
        spec: Spec,
        stats: Mapping[Statistic, Tensor],
        clip: Clipped | Fixed | None,
        seed: int,
    ) -> Solution:
        """As ``solver`` solves, with the term after all other side terms.

        Args:
            seed: of what is drawn.

        Raises:
            ValueError: as ``solver``; or a start that compares weights beside a solver that transforms the outputs.
        """
        solution = solver.solve(w_OI, spec, stats, clip)
        if self.start == "zero":
            bound = w_OI.shape[1] ** -0.5  # as torch's linears and peft's adapters begin
            generator = torch.Generator().manual_seed(seed)
            a_RI = (2 * torch.rand(self.rank, w_OI.shape[1], generator=generator) - 1) * bound
            return _with(solution, LowRank.of(a_RI.to(w_OI.device), w_OI.new_zeros(w_OI.shape[0], self.rank)))
        if solution.post:
            raise ValueError(
                f"start={self.start!r} compares the weight with its codes, and {type(solver).__name__} transforms the outputs of "
                "linears itself; use start='zero'"
            )
        # A Gram matrix is not there for an expert that no token reached: all channels count alike.
        gram = stats.get(Gram()) if self.start == "calibrated" else None
        term = _best(_residual(w_OI, solution), self._root(gram, solution.pre), self.rank)
        for _ in range(self.rounds - 1):
            left = w_OI - _outer(term, solution.pre, w_OI)
            solution = solver.solve(left, spec, stats, clip)
            term = _best(_residual(w_OI, solution), None, self.rank)
        return _with(solution, term)

    def _root(self, gram_II: Tensor | None, pre: Iterable[ChannelTransform]) -> tuple[Tensor, Tensor] | None:
        """R ``[I, I]`` float64 with ``R^T R`` the damped Gram matrix of the input behind ``pre``, and its inverse."""
        if gram_II is None or not gram_II.any():
            return None
        h_II = gram_II.double()
        for transform in pre:  # H becomes T H T^T
            h_II = transform.forward(transform.forward(h_II).T.contiguous())
        values_I, vectors_II = torch.linalg.eigh((h_II + h_II.T) / 2)
        values_I = values_I.clamp(min=0) + self.damp * values_I.clamp(min=0).mean()
        root_I = values_I.sqrt()
        inverse_I = torch.where(root_I > 1e-7 * root_I.max(), 1 / root_I, 0.0)  # what no token shows is left alone
        return root_I[:, None] * vectors_II.T, vectors_II * inverse_I


def _residual(w_OI: Tensor, solution: Solution) -> Tensor:
    """What the codes and side terms of ``solution`` lack, for the input behind its transforms, float64."""
    for transform in solution.pre:
        w_OI, _ = transform.fold_in(w_OI, None)
    lost = w_OI.double() - solution.q.dequantize().double()
    for term in solution.side:
        lost -= term.dense((lost.shape[0], lost.shape[1]))
    return lost


def _best(lost_OI: Tensor, root: tuple[Tensor, Tensor] | None, rank: int) -> LowRank:
    """The term of ``rank`` that is closest to ``lost_OI``, in the norm ``|E R^T|`` where R is given."""
    seen = lost_OI if root is None else lost_OI @ root[0].T
    u, s, vt = torch.linalg.svd(seen, full_matrices=False)
    size = s[:rank].sqrt()
    b_OR, a_RI = u[:, :rank] * size, size[:, None] * vt[:rank]
    a_RI = a_RI if root is None else a_RI @ root[1].T
    missing = rank - len(size)  # a matrix of a smaller rank than asked
    pad = torch.nn.functional.pad
    return LowRank.of(pad(a_RI, (0, 0, 0, missing)), pad(b_OR, (0, missing)))


def _outer(term: LowRank, pre: tuple[ChannelTransform, ...], w_OI: Tensor) -> Tensor:
    """The term as a change of the weight before ``pre``: a solver that transforms inputs gets what its input is to read."""
    if pre:
        raise ValueError(
            "rounds above 1 solve a weight without its term, and this solver transforms the input itself; use rounds=1"
        )
    return term.dense((w_OI.shape[0], w_OI.shape[1])).to(w_OI.dtype)


def _with(solution: Solution, term: LowRank) -> Solution:
    return replace(solution, side=(*solution.side, term))
