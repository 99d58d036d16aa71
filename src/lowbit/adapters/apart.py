"""A packed linear with low-rank terms, taken apart: the linear without them, and the factors of an adapter beside it.

Shapes: O output and I input channel as the rest of the model sees the layer, R rank.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit.modules import LinearDescription, QuantLinear
from lowbit.numerics import LowRank
from lowbit.transforms import Shift


class Apart(NamedTuple):
    """``base(x) + (x @ a_RI.T) @ b_OR.T``; factors are float32."""

    base: QuantLinear
    a_RI: Tensor
    b_OR: Tensor


def has_terms(description: LinearDescription) -> bool:
    """Whether the layer stores low-rank terms."""
    return any(part.type == LowRank.__name__ for part in description.side_terms)


def without_terms(description: LinearDescription) -> LinearDescription:
    """The layer as it is without its low-rank terms."""
    kept = tuple(part for part in description.side_terms if part.type != LowRank.__name__)
    return replace(description, side_terms=kept)


def why_inseparable(description: LinearDescription) -> str | None:
    """The reason why low-rank terms of the layer are no map of its own input; None where they are."""
    if not description.is_affine:
        return "layers normalize their outputs, low-rank terms included"
    if any(part.type == Shift.__name__ for part in description.pre):
        return "layers shift their inputs before low-rank terms read them"
    return None


@torch.no_grad()
def apart(layer: QuantLinear) -> Apart:
    """Takes ``layer``, which has low-rank terms, apart. Its transforms, which the terms stand between, are folded into the factors.

    Raises:
        ValueError: as :func:`why_inseparable`.
    """
    if reason := why_inseparable(layer.description):
        raise ValueError(f"an adapter cannot be taken out: {reason}")
    terms = [term for term in layer.side_terms if isinstance(term, LowRank)]
    others = tuple(term for term in layer.side_terms if not isinstance(term, LowRank))
    a_RI = torch.cat([term.a.float() for term in terms])
    b_OR = torch.cat([term.b.float() for term in terms], dim=1)
    if layer.description.pre:
        with torch.enable_grad():  # the pullback of a is the factor that reads the untransformed input
            x = torch.zeros(len(a_RI), layer.in_features, dtype=torch.float32, requires_grad=True)
            a_RI = torch.autograd.grad(layer._through("pre", x), x, a_RI)[0]
    b_OR = layer._through("post", b_OR.T).T
    base = QuantLinear.from_qtensor(
        layer.qtensor(), layer._buffers["bias"], layer.act, layer.act_params, layer.pre, layer.post, others
    )
    return Apart(base, a_RI.contiguous(), b_OR.contiguous())
