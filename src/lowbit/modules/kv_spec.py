"""The formats of a cache of keys and values: a description that recipes and checkpoints carry.

Nothing here stores or runs a cache yet. Whatever would have to refuses with :func:`unsupported`.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowbit.numerics import Block, PerGroup, PerToken, RangeGrid, Spec, serializable


@serializable
@dataclass(frozen=True)
class KVSpec:
    """How the cache of every attention head holds keys and values.

    Keys and values are ``[S, D]``, S tokens of D channels, keys as they are after the rotary embedding. A cache grows, and
    what it holds is never quantized again. So a range belongs to a token (``PerToken``), to a group of a token's channels
    (``PerGroup``) or to a block of consecutive tokens (``Block``, rows are tokens), and is that of the numbers themselves.

    KIVI (arXiv:2402.02750) at 2 bits: ``KVSpec(Spec(Int(2), Block(32, 1)), Spec(Int(2), PerGroup(32)), recent=128)``, which
    gives keys a range for each channel and 32 tokens, and values one for each token and 32 channels.

    Args:
        key, value: grid and granularity, and how scales are stored.
        recent: how many of the newest tokens stay floating. Tokens that share a range leave this window together: in blocks,
            when ``recent`` tokens wait, all of them; otherwise one by one, the oldest first.
        sink: how many of a sequence's first tokens stay floating.
        past_only: a call attends to its own tokens as they are, and only later calls read them quantized; False: a call
            reads its own tokens quantized too, where they are outside both windows.

    Raises:
        ValueError: formats of another kind, a granularity that would need tokens still to come, scales that are quantized
            again, negative windows, or a window that is not a whole number of blocks.
    """

    key: Spec
    value: Spec
    recent: int = 0
    sink: int = 0
    past_only: bool = True

    def __post_init__(self):
        for name, count in (("recent", self.recent), ("sink", self.sink)):
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise ValueError(f"KVSpec.{name} is a number of tokens, 0 or more, found {count!r}")
        for name, spec in (("key", self.key), ("value", self.value)):
            self._check(name, spec)

    def _check(self, name: str, spec: Spec) -> None:
        if not isinstance(spec, Spec) or not isinstance(spec.grid, RangeGrid):
            raise ValueError(
                f"KVSpec.{name} needs a Spec with a grid that a range places, such as Int(4); found {spec!r}"
            )
        grain = spec.granularity
        if not isinstance(grain, PerToken | PerGroup | Block):
            raise ValueError(
                f"KVSpec.{name} has the granularity {grain}, whose ranges would change with every token that is added; "
                "expected PerToken(), PerGroup(channels) or Block(tokens, channels)"
            )
        if spec.stats is not None:
            raise ValueError(
                f"KVSpec.{name} quantizes its scales by {spec.stats}; in a cache they are stored as they are"
            )
        if isinstance(grain, Block) and grain.rows > 1 and (self.recent < grain.rows or self.recent % grain.rows):
            raise ValueError(
                f"KVSpec.{name} shares ranges in blocks of {grain.rows} tokens, which wait in the window of recent tokens until "
                f"they are whole: recent is a multiple of {grain.rows}, found {self.recent}"
            )


def unsupported(spec: KVSpec, owner: str) -> str:
    """The message with which everything that would have to store or run such a cache refuses.

    Args:
        spec: the formats found.
        owner: what has them, such as ``"recipe 'kivi'"``.
    """
    return (
        f"{owner} has a KV cache format, {spec}. This version of lowbit can describe such a format and cannot store or run a "
        "quantized cache: remove kv to keep the cache floating, or use a version that runs it"
    )
