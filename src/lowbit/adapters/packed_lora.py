"""LoRA of peft on packed linears: the packed weight stays as it is, the adapter stands beside it.

peft asks a ``LoraConfig`` which class adapts a module that peft does not know. :mod:`lowbit.import_hooks` makes every config
answer with :class:`PackedLora`, by the interface that peft documents for custom modules. So ``get_peft_model`` and
``PeftModel.from_pretrained`` take packed models, and adapters are saved in peft's own files.

In training the packed weight is decoded again in the backward pass, not kept; the quantization of inputs lets gradients
through. So gradients are those of the weight that the layer stands for.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge

from lowbit.adapters.merge import merged_layer
from lowbit.modules import QuantEmbedding, QuantLinear

PLAIN_STARTS = (True, False, "gaussian")
"""Values of ``init_lora_weights`` that leave the base weight as it is."""


def packed_linears(model: Any) -> set[str]:
    """Names of the packed linears of ``model``, adapted ones included, that ``all-linear`` means: all but the output head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    adapted = {name: each for name, each in model.named_modules() if isinstance(each, PackedLora)}
    inside = {f"{name}.base_layer" for name in adapted}
    named = (
        name for name, each in model.named_modules() if isinstance(each, QuantLinear | PackedLora) and each is not head
    )
    return {name for name in named if name not in inside}


def check_saved_modules(model: Any, names: Iterable[str]) -> None:
    """Checks that no module that an adapter brings or trains whole (``modules_to_save``) is packed.

    Raises:
        ValueError: it is.
    """
    packed = [name for name, each in model.named_modules() if isinstance(each, QuantLinear | QuantEmbedding)]
    for asked in names:
        if found := next((name for name in packed if f".{name}".endswith(f".{asked}")), None):
            raise ValueError(
                f"modules_to_save names {asked!r}, and {found} is packed: a whole copy of it can be neither trained nor loaded. Put "
                "LoRA beside it (target_modules), or quantize the model without packing it (an override with skip)"
            )


class PackedLora(Linear):
    """A packed linear and LoRA: ``y = packed(x) + scaling B A x``."""

    def __init__(self, base_layer: Any, adapter_name: str, *args: Any, **kwargs: Any):
        self._before_merge: list[QuantLinear] = []  # a list: the layer is no part of this module's state
        super().__init__(base_layer, adapter_name, *args, **kwargs)
        self.fan_in_fan_out = False  # packed weights are [out, in], whatever the model's own are

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        """Of a packed linear, whose class peft calls unsupported."""
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device, torch.dtype]:
        """Where the adapter goes, without decoding a weight to ask it."""
        return base_layer.qweight.device, torch.float32

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Plain LoRA alone: the others compute with the base weight as a parameter."""
        return {(): None}

    def update_layer(self, adapter_name: str, *args: Any, config: Any, **kwargs: Any) -> None:
        if config.init_lora_weights not in PLAIN_STARTS:
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} changes the base weight, which is packed here; use "
                "True, False or 'gaussian'"
            )
        super().update_layer(adapter_name, *args, config=config, **kwargs)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Packs the weight with the adapters added, in the format that it had; ``unmerge`` brings the former bits back.

        It rounds what the adapters learned; :func:`lowbit.merge_adapter` measures what that costs.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        if any(self.lora_bias[name] for name in names):
            raise ValueError("an adapter with lora_bias cannot be merged into a packed layer; keep it beside the model")
        warnings.warn(
            "merging rounds an adapter into the bits of the packed layer; lowbit.merge_adapter measures what that costs",
            stacklevel=2,
        )
        base: Any = self.get_base_layer()
        merged = merged_layer(base, torch.stack([self.get_delta_weight(name).float() for name in names]).sum(0))
        if base.tiles is not None:
            merged.prepare()
        if not self._before_merge:
            self._before_merge.append(base)
        self._put(merged)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Puts the layer back that :meth:`merge` replaced, the very bits."""
        if self._before_merge:
            self._put(self._before_merge.pop())
        self.merged_adapters.clear()

    def _put(self, layer: QuantLinear) -> None:
        holder: Any = self
        while hasattr(holder.base_layer, "base_layer"):
            holder = holder.base_layer
        holder.base_layer = layer
