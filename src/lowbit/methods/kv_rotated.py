"""Caches without calibration data whose keys are rotated: each head by a Hadamard matrix, then integers per token."""

from typing import Literal

from lowbit.modules import KVSpec
from lowbit.numerics import Int, PerGroup, PerToken, Spec
from lowbit.recipes import Recipe, method
from lowbit.scheme import Scheme


@method("kv-rotated", family="kv-cache", paper="arXiv:2404.00456")
def kv_rotated(
    bits: int = 4,
    group_size: int | None = None,
    recent: int = 64,
    *,
    key_bits: int | None = None,
    value_bits: int | None = None,
    sink: int = 0,
    rotate: Literal["keys", "both", "none"] = "keys",
    centred: bool = True,
    symmetric: bool = False,
    rope: Literal["after", "before"] = "after",
) -> Recipe:
    """Keys of each head are rotated by a Hadamard matrix, then each token has a range of its own; no data.

    * bits, key_bits, value_bits: 1 to 8; 16 leaves them as they are.
    * group_size: channels of a range; None: all of a head.
    * recent, sink: the newest and the first tokens, which stay as they are.
    * rotate: which are rotated. Values gain little.
    * centred: take the mean of each key channel off before; needs recent of at least 32.
    * symmetric: no zero points.
    * rope: keys as they are after the rotary embedding, or before it, which models with large key biases need.

    QuaRot (section 3.3) rotates keys behind the rotary embedding like this; its windows and means are this project's own.
    """
    grain = PerToken() if group_size is None else PerGroup(group_size)

    def spec(own: int | None) -> Spec | None:
        width = bits if own is None else own
        return None if width == 16 else Spec(Int(width, symmetric, zero="real"), grain)

    return Recipe(
        "kv-rotated",
        Scheme(
            kv=KVSpec(
                spec(key_bits),
                spec(value_bits),
                recent=recent,
                sink=sink,
                key_rotation=None if rotate == "none" else "hadamard",
                value_rotation="hadamard" if rotate == "both" else None,
                centred=centred,
                before_rope=rope == "before",
            )
        ),
    )
