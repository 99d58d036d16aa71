"""A packed linear with something added to its weight, in the format that it has."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lowbit.modules import QuantLinear
from lowbit.numerics import QTensor, quantize, usual_fit
from lowbit.transforms import Seeded

TIED = "an adapter cannot be merged into a head that is the embedding too, which it would change"


def merged_layer(layer: QuantLinear, delta_OI: Tensor) -> QuantLinear:
    """``layer`` with ``delta_OI`` ``[out_features, in_features]`` added to the weight that it stands for, in the same format.

    Side terms, transforms, biases and the format of the input stay. The scales are the stored ones, or new ones where these
    lose less, so nothing changes where there is nothing to add.

    Raises:
        ValueError: a layer whose transforms let no addition through, or whose weight another module stores.
    """
    if layer.is_tied:
        raise ValueError(f"{TIED}; keep it beside the model")
    q = layer.qtensor()
    with torch.no_grad():
        wanted = q.dequantize() + _inner(layer, delta_OI.float().to(q.codes.device))
    candidates = (_with_stored_scales(q, wanted), _with_new_scales(q, wanted))
    chosen = min(candidates, key=lambda each: float((each.dequantize() - wanted).square().sum()))
    return QuantLinear.from_qtensor(
        chosen,
        layer._buffers["bias"],
        layer.act,
        layer.act_params,
        layer.pre,
        layer.post,
        layer.side_terms,
    )


def _with_stored_scales(q: QTensor, wanted_OI: Tensor) -> QTensor:
    grain = q.spec.granularity
    codes = grain.join(q.spec.grid.encode(grain.split(wanted_OI), q.params), q.shape)
    return replace(q, codes=codes.contiguous())


def _with_new_scales(q: QTensor, wanted_OI: Tensor) -> QTensor:
    return quantize(wanted_OI, q.spec, usual_fit(q.spec.grid))


def _inner(layer: QuantLinear, delta_OI: Tensor) -> Tensor:
    """The change of the stored weight, which stands between the layer's transforms, that changes the whole map by ``delta_OI``.

    Raises:
        ValueError: a transform that is not linear, or of the output and not one whose inverse is known.
    """
    for transform in layer.pre:
        if not transform.exact:
            raise ValueError(
                f"an adapter cannot be merged through {type(transform).__name__}; keep it beside the model"
            )
        zero = torch.zeros(delta_OI.shape[0], dtype=torch.float32)
        delta_OI, bias = transform.fold_in(delta_OI, zero)
        if bias is not None and bool(bias.any()):
            raise ValueError(
                f"an adapter cannot be merged through {type(transform).__name__}; keep it beside the model"
            )
    for transform in reversed(layer.post):
        if not isinstance(transform, Seeded):
            raise ValueError(
                f"an adapter cannot be merged through {type(transform).__name__}; keep it beside the model"
            )
        delta_OI, _ = transform.inverse().fold_out(delta_OI, None)
    return delta_OI
