"""The weight that codes were rounded from: where quantization-aware training goes on."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.modules import DraftLinear
from lowbit.numerics import Clipped, RangeGrid, extremes
from lowbit.solve import Solution


@torch.no_grad()
def latent_weight(draft: DraftLinear, solution: Solution) -> Tensor:
    """A weight ``[O, I]`` float32, for the input that the packed layer's codes read, that rounds to the codes of ``solution``.

    It is the draft's target without what the solver put into side terms. Three things move it:

    * A range that a step chose as shares of the extremes clips it, so that the extremes of the result are that range.
    * The solver's own transforms of the input are folded in.
    * Where the solver did not choose the nearest code, as column solvers do, it is the value of the code that they chose.
    """
    assert draft.format is not None and not solution.post
    spec, weight = draft.format.weight, draft.target
    for transform in solution.pre:
        weight, _ = transform.fold_in(weight, None)
    for term in solution.side:
        weight = weight - term.dense((weight.shape[0], weight.shape[1]))
    weight, chosen = weight.float(), solution.q.dequantize()
    grain, shape = spec.granularity, tuple(weight.shape)
    shares = draft.range_shares
    if isinstance(shares, Clipped):
        x_GK = grain.split(weight)
        lo, hi = extremes(x_GK)
        weight = grain.join(x_GK.clamp(lo * shares.lo_share_G1, hi * shares.hi_share_G1), shape)
    if not isinstance(spec.grid, RangeGrid):
        return chosen
    nearest = grain.join(spec.grid.fake(grain.split(weight), solution.q.params), shape)  # pyright: ignore[reportArgumentType]
    return torch.where(nearest == chosen, weight, chosen).contiguous()
