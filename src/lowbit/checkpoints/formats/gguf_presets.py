"""llama.cpp's mixes of types: which type each tensor has under names such as q4_k_m.

The rules follow ``llama-quantize`` without an importance matrix: values and the MLP's last matrix have more bits in some
blocks, the output head has 6 bits, and a tensor whose rows are no multiple of 256 falls back on a type with blocks of 32. Mixtures
of experts and models of 70B have rules of their own there, which are left out. One differs: an embedding always has the type that tensors fall back on, because rows are
looked up one by one here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lowbit.checkpoints.formats.base import TensorRole
from lowbit.layouts.ggml import BLOCK_TYPES, BlockType

_FALLBACK = {
    "Q2_K": "IQ4_NL",
    "Q3_K": "IQ4_NL",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "TQ1_0": "Q4_0",
    "TQ2_0": "Q4_0",
}
"""What a tensor has whose rows are no multiple of 256."""
_UNIFORM = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q6_K", "TQ1_0", "TQ2_0")
_HEAD = 6  # bits that an output head has at least


@dataclass(frozen=True)
class _Block:
    """A block's place in the model."""

    number: int
    count: int

    @property
    def more(self) -> bool:
        """Whether it is in the first or last eighth, or the third of three between them."""
        eighth = self.count // 8
        return self.number < eighth or self.number >= 7 * self.count // 8 or (self.number - eighth) % 3 == 2


def _q2_k(role: str, block: _Block, shared: int) -> str:
    if role == "v":
        return "Q4_K" if shared >= 4 else "Q3_K"
    return "Q3_K" if role in ("down", "o") else "Q2_K"


def _q3_k_s(role: str, block: _Block, shared: int) -> str:
    return "Q3_K"


def _q3_k_m(role: str, block: _Block, shared: int) -> str:
    if role == "v":
        return "Q5_K" if block.number < 2 else "Q4_K"
    if role == "down":
        return "Q5_K" if block.number < block.count // 16 else "Q4_K"
    return "Q4_K" if role in ("o", "qkv") else "Q3_K"


def _q3_k_l(role: str, block: _Block, shared: int) -> str:
    return "Q5_K" if role in ("v", "down", "o") else "Q4_K" if role == "qkv" else "Q3_K"


def _q4_k_s(role: str, block: _Block, shared: int) -> str:
    if role == "v":
        return "Q5_K" if block.number < 4 else "Q4_K"
    return "Q5_K" if role == "down" and block.number < block.count // 8 else "Q4_K"


def _q4_k_m(role: str, block: _Block, shared: int) -> str:
    if role in ("v", "down") and block.more:
        return "Q6_K"
    return "Q5_K" if role == "qkv" else "Q4_K"


def _q5_k_s(role: str, block: _Block, shared: int) -> str:
    return "Q5_K"


def _q5_k_m(role: str, block: _Block, shared: int) -> str:
    return "Q6_K" if role == "qkv" or (role in ("v", "down") and block.more) else "Q5_K"


_MIXES = {
    "q2_k": _q2_k,
    "q3_k_s": _q3_k_s,
    "q3_k_m": _q3_k_m,
    "q3_k_l": _q3_k_l,
    "q4_k_s": _q4_k_s,
    "q4_k_m": _q4_k_m,
    "q5_k_s": _q5_k_s,
    "q5_k_m": _q5_k_m,
}

PRESETS = (*_MIXES, *(name.lower() for name in _UNIFORM))
"""Names as llama.cpp has them, in lower case."""


def types_of(preset: str, tensors: Sequence[TensorRole], shared: int, tied: bool) -> dict[str, BlockType]:
    """The type of every tensor by name, those left out whose rows no type divides.

    Args:
        preset: one of :data:`PRESETS`.
        tensors: linears of blocks, the embedding and the head.
        shared: queries that share a key and value.
        tied: the embedding is the output head.
    """
    count = 1 + max((tensor.block for tensor in tensors), default=0)
    found = {}
    for tensor in tensors:
        name = _type(preset, tensor, _Block(tensor.block, count), shared, tied)
        kind = BLOCK_TYPES[name]
        if tensor.columns % kind.elements:
            kind = BLOCK_TYPES[_FALLBACK.get(name, name)]
        if tensor.columns % kind.elements == 0:
            found[tensor.name] = kind
    return found


def stand_ins(preset: str, tensors: Sequence[TensorRole], shared: int, tied: bool) -> str | None:
    """A sentence on the linears that have another type than the preset names, for the arguments of :func:`types_of`; None: none has."""
    linears = [tensor for tensor in tensors if tensor.role not in ("embedding", "head")]
    count = 1 + max((tensor.block for tensor in tensors), default=0)
    found = types_of(preset, tensors, shared, tied)
    pairs: Counter[tuple[str, str]] = Counter()
    for tensor in linears:
        named, kind = _type(preset, tensor, _Block(tensor.block, count), shared, tied), found.get(tensor.name)
        if kind is None or kind.name != named:
            pairs[named, "floating point" if kind is None else f"{kind.name}, {kind.bits:g} bits"] += 1
    if not pairs:
        return None
    listed = "; ".join(f"{other} for {named} in {number}" for (named, other), number in pairs.items())
    return (
        f"gguf:{preset}: rows of {pairs.total()} of {len(linears)} linears are no whole number of its blocks, and other types stand in, "
        f"as llama.cpp's tools choose them: {listed}"
    )


def _type(preset: str, tensor: TensorRole, block: _Block, shared: int, tied: bool) -> str:
    whole = preset.upper() if preset.upper() in _UNIFORM else preset[:4].upper()
    if tensor.role == "head" or (tensor.role == "embedding" and tied):
        whole = "Q8_0" if tensor.columns % 256 or whole == "Q8_0" else f"Q{_HEAD}_K"
    elif tensor.role != "embedding" and preset in _MIXES:
        whole = _MIXES[preset](tensor.role, block, shared)
    if tensor.role != "embedding":
        return whole
    whole = "Q4_K" if whole.startswith("TQ") else whole
    return _FALLBACK.get(whole, whole)
