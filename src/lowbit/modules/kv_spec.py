"""The formats of a cache of keys and values: a description that recipes and checkpoints carry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lowbit.numerics import Block, Float, Int, PerGroup, PerTensor, PerToken, RangeGrid, Spec, serializable, untagged

LEAST_TOKENS = 32
"""Tokens over which a channel's mean is taken, at least."""


@serializable
@dataclass(frozen=True)
class KVSpec:
    """How the cache of every attention head holds keys and values.

    Keys and values are ``[S, D]``, S tokens of D channels. A cache grows, and what it holds is never quantized again. So a
    range belongs to a token (``PerToken``), to a group of a token's channels (``PerGroup``) or to a block of consecutive
    tokens (``Block``, rows are tokens), and is that of the numbers themselves. Levels of a normal distribution (``Normal``)
    are placed by the root mean square instead. Or one range serves all tokens of a head (``PerTensor``), and calibration has
    found it; what is beyond it is clipped.

    KIVI (arXiv:2402.02750) at 2 bits: ``KVSpec(Spec(Int(2, zero="real"), Block(32, 1)), Spec(Int(2, zero="real"),
    PerGroup(32)), recent=128)``, which gives keys a range for each channel and 32 tokens, and values one for each token and
    32 channels.

    Args:
        key, value: grid and granularity, and how scales are stored; None: as the model computes them.
        recent: how many of the newest tokens stay floating. Tokens that share a range leave this window together: in blocks,
            when ``recent`` tokens wait, all of them; otherwise one by one, the oldest first.
        sink: how many of a sequence's first tokens stay floating.
        past_only: a call attends to its own tokens as they are, and only later calls read them quantized; False: a call
            reads its own tokens quantized too, where they are outside both windows.
        key_rotation, value_rotation: channels of a head are rotated before they are quantized: ``"hadamard"``, all heads by the
            same matrix; ``"learned"``, each by its own, which calibration has found.
        centred: the mean of each key channel, over the tokens that a sequence has when its first ones are packed, is taken
            off before, and added again.
        before_rope: keys are quantized as they were before the rotary embedding, which is applied again on reading. For
            models whose keys have large biases.
        key_shifted, value_shifted: each channel of each head has a number taken off before, which calibration has found.
        key_scaled, value_scaled: each channel of each head is divided by a number then, which calibration has found.
        shared_heads: a range is that of all key-value heads together: of a whole token (``PerToken``), or of all tokens
            (``PerTensor``).

    What calibration has found is kept with the attention modules of a checkpoint (:class:`~lowbit.modules.CacheCalibration`).

    Raises:
        ValueError: formats of another kind, a granularity that would need tokens still to come, scales that are quantized
            again, negative windows, a window that is not a whole number of blocks, or too short for means, a range of all tokens
            beside coordinates, or ranges of all heads that have other parts than tokens.
    """

    key: Spec | None
    value: Spec | None
    recent: int = 0
    sink: int = 0
    past_only: bool = True
    key_rotation: Literal["hadamard", "learned"] | None = None
    value_rotation: Literal["hadamard", "learned"] | None = None
    centred: bool = False
    before_rope: bool = False
    key_scaled: bool = False
    key_shifted: bool = False
    value_scaled: bool = False
    value_shifted: bool = False
    shared_heads: bool = False

    def __post_init__(self):
        for name, count in (("recent", self.recent), ("sink", self.sink)):
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise ValueError(f"KVSpec.{name} is a number of tokens, 0 or more, found {count!r}")
        for name, rotation in (("key_rotation", self.key_rotation), ("value_rotation", self.value_rotation)):
            if rotation not in ("hadamard", "learned", None):
                raise ValueError(f"KVSpec.{name} is 'hadamard', 'learned' or None, found {rotation!r}")
        for name, spec in (("key", self.key), ("value", self.value)):
            if spec is not None:
                self._check(name, spec)
        if self.centred and self.key is not None and self.recent < LEAST_TOKENS:
            raise ValueError(
                f"KVSpec.centred takes means over the tokens that wait, so recent is at least {LEAST_TOKENS}, found {self.recent}"
            )

    def _check(self, name: str, spec: Spec) -> None:
        if not isinstance(spec, Spec) or not isinstance(spec.grid, RangeGrid):
            raise ValueError(
                f"KVSpec.{name} needs a Spec with a grid that a range places, such as Int(4); found {spec!r}"
            )
        grain = spec.granularity
        if not isinstance(grain, PerToken | PerGroup | Block | PerTensor):
            raise ValueError(
                f"KVSpec.{name} has the granularity {grain}, whose ranges would change with every token that is added; "
                "expected PerToken(), PerGroup(channels), Block(tokens, channels), or PerTensor() for a range from calibration"
            )
        if isinstance(grain, PerTensor):
            self._check_static(name, spec)
        elif self.shared_heads and not isinstance(grain, PerToken):
            raise ValueError(f"KVSpec.shared_heads goes with PerToken() or PerTensor(), found {grain} of {name}s")
        if spec.stats is not None:
            raise ValueError(
                f"KVSpec.{name} quantizes its scales by {spec.stats}; in a cache they are stored as they are"
            )
        if isinstance(grain, Block) and grain.rows > 1 and (self.recent < grain.rows or self.recent % grain.rows):
            raise ValueError(
                f"KVSpec.{name} shares ranges in blocks of {grain.rows} tokens, which wait in the window of recent tokens until "
                f"they are whole: recent is a multiple of {grain.rows}, found {self.recent}"
            )

    def _check_static(self, name: str, spec: Spec) -> None:
        if not isinstance(spec.grid, Int | Float):
            raise ValueError(
                f"KVSpec.{name} has one range for all tokens, which places integers or floats, found {spec.grid}"
            )
        placed = getattr(self, f"{name}_rotation"), getattr(self, f"{name}_scaled"), getattr(self, f"{name}_shifted")
        if any(placed) or (name == "key" and self.centred):
            raise ValueError(
                f"KVSpec.{name} has one range for all tokens, which is that of {name}s as they come: leave rotations, scales, "
                "shifts and centred out"
            )

    @property
    def calibrated(self) -> frozenset[str]:
        """The buffers of :class:`~lowbit.modules.CacheCalibration` that it needs; none where it needs no calibration."""
        asked = {
            "key_range": self.key is not None and isinstance(self.key.granularity, PerTensor),
            "value_range": self.value is not None and isinstance(self.value.granularity, PerTensor),
            "key_rotation": self.key is not None and self.key_rotation == "learned",
            "key_scale": self.key is not None and self.key_scaled,
            "key_shift": self.key is not None and self.key_shifted,
            "value_rotation": self.value is not None and self.value_rotation == "learned",
            "value_scale": self.value is not None and self.value_scaled,
            "value_shift": self.value is not None and self.value_shifted,
        }
        return frozenset(name for name, wanted in asked.items() if wanted)

    def bits(self, dim: int, heads: int = 1) -> float:
        """Stored bits for each number of a long sequence of ``heads`` heads of ``dim`` channels, scales and zero points counted."""
        sharing = heads if self.shared_heads else 1
        return sum(_bits(spec, dim, sharing) for spec in (self.key, self.value)) / 2


def _bits(spec: Spec | None, dim: int, sharing: int) -> float:
    if spec is None:
        return 16.0
    if isinstance(spec.granularity, PerTensor):
        return -(-dim * spec.grid.bits // 32) * 32 / dim
    grain, words = spec.granularity, -(-dim * spec.grid.bits // 32) * 32
    rows = grain.rows if isinstance(grain, Block) else 1
    params = grain.param_shape((rows, dim))[1] * len(spec.grid.fields) * spec.torch_scale_dtype.itemsize * 8
    return (words * rows + params / sharing) / (rows * dim)


@untagged
@dataclass(frozen=True)
class KVRule:
    """Another format of the cache of some layers.

    Args:
        layers: numbers of layers from 0; negative ones count from the last.
        kv: their format; None: as the model computes it.
    """

    layers: tuple[int, ...]
    kv: KVSpec | None = None

    def matches(self, layer: int, count: int) -> bool:
        """Whether it is of ``layer`` of ``count``."""
        return layer in self.layers or layer - count in self.layers


@dataclass(frozen=True)
class KVFormats:
    """The formats of a model's whole cache.

    Args:
        kv: of every layer; None: as the model computes it.
        overrides: other formats of some layers; the last rule that matches counts.
    """

    kv: KVSpec | None = None
    overrides: tuple[KVRule, ...] = ()

    def __bool__(self) -> bool:
        """Whether any layer is quantized."""
        return self.kv is not None or any(rule.kv is not None for rule in self.overrides)

    @property
    def calibrated(self) -> frozenset[str]:
        """What some layer needs of calibration, see :attr:`KVSpec.calibrated`."""
        specs = (self.kv, *(rule.kv for rule in self.overrides))
        return frozenset[str]().union(*(spec.calibrated for spec in specs if spec is not None))


_ATTRIBUTE = "_lowbit_kv"


def set_kv_formats(model: Any, formats: KVFormats) -> None:
    """Notes at ``model`` how its cache is held; copies and pickles of the model keep it. Without formats, takes a note away."""
    if formats:
        setattr(model, _ATTRIBUTE, formats)
    elif hasattr(model, _ATTRIBUTE):
        delattr(model, _ATTRIBUTE)


def kv_formats(model: Any) -> KVFormats:
    """What :func:`set_kv_formats` noted; nothing is quantized where it noted nothing."""
    return getattr(model, _ATTRIBUTE, KVFormats())
