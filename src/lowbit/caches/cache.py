"""A transformers cache whose layers of full attention are packed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lowbit.caches.coordinates import Coordinates
from lowbit.caches.layer import PackedLayer
from lowbit.caches.rotary import frequencies
from lowbit.modules import KVRule, KVSpec


class PackedCache(DynamicCache):
    """Keys and values of every layer: those of full attention packed, others as transformers holds them.

    Args:
        config: a model's configuration.
        spec: the format; None: only layers of ``overrides`` are packed.
        overrides: other formats of some layers; the last rule that matches counts.
        coordinates: by layer, those in which keys and values are quantized, where calibration found some.

    Raises:
        ValueError: no layer of the model can be packed, or a rule names one that is not there.
    """

    def __init__(
        self,
        config: Any,
        spec: KVSpec | None,
        overrides: Sequence[KVRule] = (),
        coordinates: Mapping[int, tuple[Coordinates, Coordinates]] | None = None,
    ):
        text = config.get_text_config(decoder=True)
        super().__init__(config=text)
        count = len(self.layers)
        for rule in overrides:
            if beyond := [layer for layer in rule.layers if not -count <= layer < count]:
                raise ValueError(
                    f"kv_overrides name layers {', '.join(map(str, beyond))}, and the model has {count}, which count from 0 (from the "
                    "last: from -1)"
                )
        packable = [i for i, layer in enumerate(self.layers) if type(layer) is DynamicLayer]
        if not packable:
            raise ValueError(
                f"{text.model_type} has no layers of full attention whose keys and values could be packed; leave kv out"
            )
        for i in packable:
            form = format_of(i, count, spec, overrides) or KVSpec(None, None)
            self.layers[i] = PackedLayer(form, *(coordinates or {}).get(i, ()), frequencies=_turning(form, text))

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values that it holds, with scales, windows and spare room."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, PackedLayer):
                total += layer.nbytes
            else:
                total += sum(t.nbytes for t in vars(layer).values() if isinstance(t, Tensor))
        return total

    @property
    def packed_layers(self) -> dict[int, PackedLayer]:
        """The layers of full attention, by number."""
        return {i: layer for i, layer in enumerate(self.layers) if isinstance(layer, PackedLayer)}

    def stay_packed(self, whether: bool) -> None:
        """Says whether attention reads packed tokens where they are, as lowbit's own attention function does."""
        for layer in self.layers:
            if isinstance(layer, PackedLayer):
                layer.lazy = whether

    def pad(self, positions: int) -> None:
        """Says how many leading positions some sequence of the batch does not use (left padding); they are not packed."""
        for layer in self.layers:
            if isinstance(layer, PackedLayer):
                layer.padding = positions


def format_of(layer: int, count: int, spec: KVSpec | None, overrides: Sequence[KVRule]) -> KVSpec | None:
    """The format of ``layer`` of ``count``."""
    for rule in overrides:
        if rule.matches(layer, count):
            spec = rule.kv
    return spec


def _turning(form: KVSpec, text: Any) -> Tensor | None:
    if not form.before_rope:
        return None
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return frequencies(text, dim)
