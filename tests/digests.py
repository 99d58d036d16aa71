"""What a native checkpoint decodes to, as SHA-256 digests.

No value that goes into a digest depends on the order of a sum, so every processor gives the same bits. The script that made
``tests/data`` recorded these digests with the lowbit of that time, and a test compares them with today's; so this module uses
only names that every lowbit has had.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from lowbit.modules import QuantLinear, fake_quantize_activation


def digest(x: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    header = f"{x.dtype} {list(x.shape)} ".encode()
    return hashlib.sha256(header + x.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def layer_digests(layer: QuantLinear) -> dict[str, str]:
    """Digests of what one packed layer does.

    Returns:
        ``weight``: of the decoded weight with its side terms. A low-rank term is exact up to rank 2.
        ``input``: of a fixed input, quantized and decoded; only where the layer quantizes its input.
        ``pre0``, ``post0`` and so on: of a fixed input after that transform. A rotation is applied to the unit vectors
        instead, so that each number is one product and not a sum.
    """
    digests = {"weight": digest(layer.dequantize())}
    if layer.act is not None:
        x = _fixed_input(layer.shape[1])
        digests["input"] = digest(fake_quantize_activation(x, layer.act, layer.act_params))
    for place, width in (("pre", layer.in_features), ("post", layer.out_features)):
        for i, transform in enumerate(getattr(layer, place, ())):  # the first lowbit had no post
            rotates = hasattr(transform, "seed")
            x = torch.eye(width) if rotates else _fixed_input(width)
            digests[f"{place}{i}"] = digest(transform.forward(x))
    return digests


def model_digests(model: nn.Module) -> dict[str, dict[str, str]]:
    """:func:`layer_digests` of every packed layer, by module name."""
    return {name: layer_digests(module) for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def _fixed_input(width: int) -> Tensor:
    """Three tokens of numbers that float32 holds exactly, some of them outliers, ``[3, width]``."""
    x = ((torch.arange(3 * width) * 37 % 101) - 50).float() / 16
    x[::13] *= 8
    return x.view(3, width)
