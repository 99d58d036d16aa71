"""Keys as they were before the rotary embedding.

A cache gets keys after it. Turning key number i back by i positions and, on reading, forth again restores exactly what came,
whatever the position of the key was: the number only decides how well channels keep still over tokens, and a number that is
off by the same amount for all tokens of a sequence (padding) does as well.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


def frequencies(config: Any, dim: int) -> Tensor:
    """Angles for each position of channel i with channel i + half, float32 ``[half]``, of a model's text configuration.

    Args:
        config: as :meth:`get_text_config` gives it.
        dim: channels of a head.

    Raises:
        ValueError: the configuration has no rotary embedding that turns halves.
    """
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and "full_attention" in rope:
        rope = rope["full_attention"]
    if not isinstance(rope, dict) or not isinstance(rope.get("rope_theta"), int | float):
        raise ValueError(
            f"keys before the rotary embedding need a model with one; {getattr(config, 'model_type', 'this model')} has no "
            "rope_theta: keep keys as they are after it"
        )
    kind = rope.get("rope_type", "default")
    if kind != "default" and kind in ROPE_INIT_FUNCTIONS:
        return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))[0].float()
    turned = int(dim * (rope.get("partial_rotary_factor") or 1.0))
    return rope["rope_theta"] ** -(torch.arange(0, turned, 2).float() / turned)


@lru_cache(maxsize=4)
def table(frequencies: tuple[float, ...], positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every angle, ``[half, positions]`` each, float32: what :func:`turned` computes."""
    with torch.inference_mode(False):
        place_T1 = torch.arange(positions, dtype=torch.float32)[:, None]
        angle_FT = (place_T1 * torch.tensor(frequencies, dtype=torch.float32)).T
        return angle_FT.cos().contiguous(), angle_FT.sin().contiguous()


def turned(x_BHTD: Tensor, frequencies_F: Tensor, start: int, by: int) -> Tensor:
    """Tokens number ``start`` and following, turned by their number times ``by`` (1 or -1) positions, float32."""
    half = len(frequencies_F)
    position_T1 = torch.arange(start, start + x_BHTD.shape[2], device=x_BHTD.device, dtype=torch.float32)[:, None]
    angle_TF = position_T1 * frequencies_F.to(x_BHTD.device)
    cos, sin = angle_TF.cos(), angle_TF.sin() * by
    first, second, rest = x_BHTD.float().tensor_split((half, 2 * half), -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)
