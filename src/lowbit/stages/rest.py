"""What comes behind the last block: logits, and what is stored of the model outside of the blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn

from lowbit.modules import kept_weights
from lowbit.numerics import narrowed
from lowbit.numerics.divergence import kl_and_agreement
from lowbit.plan.outside import OutsidePlan
from lowbit.stages.outside import pack_outside, replaced
from lowbit.stages.stream import outside
from lowbit.stages.streams import Streams

_COST_STRIDE = 2
"""What a packed embedding costs is measured at every position of this number: a mean, whose limit is twice what is usual."""
_TOGETHER = 256
"""Positions whose logits are in memory at once: those of a large vocabulary take more than a block."""


class Rest:
    """The embedding, the head and the norms of a model whose blocks ``streams`` have passed.

    Args:
        streams: behind the last block. Everything outside of the blocks is one more unit in the section that they are in.

    Attributes:
        packs: whether the embedding and the head are packed.
        cost: what that costs in nats a token, where it was measured.
    """

    def __init__(self, streams: Streams):
        self.streams, self.section, self.blocks = streams, streams.section, len(streams.plan.blocks)
        self.plan, self.source, self.model = streams.plan, streams.source, streams.model
        self.packs = False
        self.cost: float | None = None
        self._packed: dict[str, nn.Module] = {}

    @property
    def packed(self) -> OutsidePlan:
        """What is packed outside of the blocks: all of the plan's, or nothing, as :meth:`settle` decided."""
        return self.plan.outside if self.packs else OutsidePlan()

    def settle(self) -> None:
        """Decides whether the embedding and the head are packed: not if that costs more than the recipe's limit."""
        plan = self.plan.outside
        if len(self.section.finished) > self.blocks:
            record = self.section.finished[self.blocks]["record"]
            self.packs, self.cost = bool(record.get("packs_outside")), record.get("outside_cost")
            return
        self.packs = bool(plan)
        if plan and self.streams.ids is not None:
            self.cost = self._cost()
            self.packs = plan.limit is None or self.cost < plan.limit

    def _cost(self) -> float:
        """Nats a token by which the packed embedding and head move the quantized model.

        Measured from the quantized model, not as a difference of two distances from the original: errors of blocks and of
        embeddings are independent, and their chance products are larger than what is measured.
        """
        streams, cost = self.streams, 0.0
        assert streams.stream is not None and streams.ids is not None
        with streams.stream.loaded_outside(self.source), self._running() as modules:
            rest, unpacked = streams.narrowed(self.plan.outside), streams.narrowed(OutsidePlan())
            for w in streams.watched:
                ids = streams.ids[w : w + 1, ::_COST_STRIDE]
                plain = streams.hidden("quant", w)[:, ::_COST_STRIDE]
                packed = streams.hidden("packed", w)[:, ::_COST_STRIDE] if streams.has_packed_stream else plain
                with replaced(self.model, {}, unpacked):
                    before = streams.logits_of(ids, plain)
                with replaced(self.model, modules, rest):
                    kl_T, _ = kl_and_agreement(before, streams.logits_of(ids, packed))
                    cost += kl_T.mean().item()
        return cost / len(streams.watched)

    @contextmanager
    def _running(self) -> Iterator[dict[str, nn.Module]]:
        """:meth:`_pack`; while open, a packed head keeps its decoded weight."""
        modules = self._pack()
        with kept_weights(nn.ModuleList(modules.values()), _TOGETHER):
            yield modules

    def _pack(self) -> dict[str, nn.Module]:
        """What the plan packs outside of the blocks, packed once; its weights must be loaded the first time."""
        if not self._packed:
            self._packed = pack_outside(self.model, self.plan.outside)
        return self._packed

    def write(self) -> None:
        """Stores everything outside the blocks, packed as :meth:`settle` decided or as it was."""
        if len(self.section.finished) > self.blocks:
            return
        packed = self.packed
        tied = set(self.model.all_tied_weights_keys)
        plain = [key for key in self.streams.kept_outside(packed) if key not in tied]
        self.source.load(self.model, plain, dtype=None)
        state = self.model.state_dict()
        tensors = {key: narrowed(key, state[key], self.plan.kept.dtype_of(key)) for key in plain}
        if packed and not self._packed:
            for name in packed.stored:
                self.source.load_into(self.model, name)
        for name, module in (self._pack() if packed else {}).items():
            tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        record = {"packs_outside": self.packs, "outside_cost": self.cost} if self.plan.outside else {}
        self.section.write(self.section.unit_name(self.blocks, self.blocks + 1), tensors, record)
        self.source.release_tensors(self.model, outside(self.model, self.streams.architecture))

    def logits(self) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
        """``(window, positions, original logits [M, V], quantized logits [M, V])`` of the windows :attr:`Streams.watched`, a
        part of the positions :attr:`Streams.measured` at a time."""
        streams = self.streams
        assert streams.stream is not None and streams.ids is not None
        last = "packed" if self.packs and streams.has_packed_stream else "quant"
        with streams.stream.loaded_outside(self.source), self._running() if self.packs else nullcontext({}) as modules:
            rest = streams.narrowed(self.packed)
            for w in streams.watched:
                for at in _parts(range(streams.ids.shape[1])[streams.measured]):
                    ids = streams.ids[w : w + 1, at]
                    original = streams.logits_of(ids, streams.hidden("fp", w)[:, at])
                    with replaced(self.model, modules, rest):
                        quantized = streams.logits_of(ids, streams.hidden(last, w)[:, at])
                    yield w, at, original, quantized


def _parts(positions: range) -> Iterator[slice]:
    for start in range(0, len(positions), _TOGETHER):
        part = positions[start : start + _TOGETHER]
        yield slice(part.start, part.stop, part.step)
