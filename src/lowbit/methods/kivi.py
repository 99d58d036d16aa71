"""KIVI: keys quantized per channel in blocks of tokens, values per token, and a window of recent tokens."""

import re
from dataclasses import replace
from typing import Literal

from lowbit.modules import KVRule, KVSpec
from lowbit.numerics import Block, Int, PerGroup, Spec
from lowbit.recipes import Recipe, method
from lowbit.scheme import Scheme


@method("kivi", family="kv-cache", paper="arXiv:2402.02750")
def kivi(
    bits: int = 2,
    group_size: int = 32,
    recent: int = 128,
    *,
    key_bits: int | None = None,
    value_bits: int | None = None,
    sink: int = 0,
    wide_layers: int | str = "",
    wide_bits: int = 4,
    rope: Literal["after", "before"] = "after",
) -> Recipe:
    """Keys have a range for each channel and group_size tokens, values for each token and group_size channels; no data.

    * bits: of keys and values, 1 to 8; 16 leaves them as they are.
    * group_size: tokens of a key's range, channels of a value's.
    * recent: tokens that stay as they are. Keys leave this window together, when it is full; values one by one.
    * key_bits, value_bits: where they differ from bits.
    * sink: the first tokens, which stay as they are; the paper has none.
    * wide_layers: numbers of layers, by commas, whose keys have wide_bits. Few layers cause most of the loss at 2 bits, others in each
      model; ``benchmarks/kv_cache.py --sensitivity`` finds them. The paper has none.
    * rope: keys as they are after the rotary embedding (as published), or before it, which models with large key biases need.

    A call attends to its own tokens as they are, as in the authors' code; the window's length is a multiple of group_size.
    """
    keys, values = (_grid(bits if own is None else own) for own in (key_bits, value_bits))
    spec = KVSpec(
        keys and Spec(keys, Block(group_size, 1)),
        values and Spec(values, PerGroup(group_size)),
        recent=recent,
        sink=sink,
        before_rope=rope == "before",
    )
    if not re.fullmatch(r"[-\d, ]*", str(wide_layers)):
        raise ValueError(f"wide_layers are numbers of layers by commas, such as 4,17,18; found {wide_layers!r}")
    layers = tuple(int(layer) for layer in re.findall(r"-?\d+", str(wide_layers)))
    wide = _grid(wide_bits)
    rule = KVRule(layers, replace(spec, key=wide and Spec(wide, Block(group_size, 1))))
    return Recipe("kivi", Scheme(kv=spec, kv_overrides=(rule,) if layers else ()))


def _grid(bits: int) -> Int | None:
    return None if bits == 16 else Int(bits, zero="real")
