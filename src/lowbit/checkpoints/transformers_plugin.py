"""transformers reads native checkpoints: ``AutoModelForCausalLM.from_pretrained(dir)`` after ``import lowbit``.

transformers builds the model without weights, lets a quantizer change it, and then fills it tensor by tensor. Ours puts
empty packed layers in place; their buffers already have the checkpoint's dtypes, and transformers casts a tensor to the
dtype of its place, so that whatever dtype is asked for the packed tensors arrive bit for bit and only the rest is cast.

:mod:`lowbit.import_hooks` imports this module while transformers itself is being imported. At its top this module
may therefore import only what ``transformers.quantizers.auto`` has imported before; the rest is imported in functions.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

if TYPE_CHECKING:
    from lowbit.checkpoints.description import ModelDescription

METHOD = "lowbit"
"""The ``quant_method`` of native checkpoints; equal to ``description.METHOD``, which cannot be imported here."""


class LowbitConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a native checkpoint, see :mod:`lowbit.checkpoints.description`. Unknown keys are kept.

    It is checked with the tensors, by the quantizer, which knows their directory.
    """

    def __init__(self, **description: Any):
        # Imported before transformers makes meta the default device, on which modules cannot make their tables.
        from lowbit.checkpoints import swap as _swap  # noqa: F401
        from lowbit.checkpoints.native import checking as _checking  # noqa: F401

        self.__dict__.update(description)

    def description(self) -> ModelDescription:
        """What the checkpoint stores."""
        from lowbit.checkpoints.description import ModelDescription

        return ModelDescription.from_json(self.to_dict())


class LowbitQuantizer(HfQuantizer):
    """Loads native checkpoints; quantizing on the fly is not what it is for."""

    requires_calibration = True
    quantization_config: LowbitConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from pathlib import Path

        from lowbit.checkpoints.native.checking import check_layers, check_places
        from lowbit.checkpoints.shards import ModelError, read_shard_header
        from lowbit.checkpoints.swap import swap
        from lowbit.modules import CacheCalibration, OperandRanges

        files = [Path(file) for file in kwargs.get("checkpoint_files") or ()]
        self._directory = files[0].parent if files else Path(str(model.name_or_path))
        headers = {name: header for file in files for name, header in read_shard_header(file).items()}
        description = check_layers(self._directory, self.quantization_config.to_dict(), headers)
        try:
            swapped = swap(model, description)
        except ValueError as error:
            raise ModelError(f"{self._directory}: {error}") from error
        check_places(self._directory, model, headers)
        if description.guarded is not None:
            ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
            model._keys_to_ignore_on_load_unexpected = {*ignored, re.escape(description.guarded)}
        found = (OperandRanges, CacheCalibration)  # what calibration found; kept in its own dtypes
        kept = (name for name, module in model.named_modules() if isinstance(module, found))
        self._packed = tuple(f"{name}." for name in (*swapped, *kept))
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from lowbit import decoding
        from lowbit.architectures import IMPLEMENTATION
        from lowbit.checkpoints.native.checking import check_and_prepare
        from lowbit.checkpoints.swap import tie_heads
        from lowbit.decoding.packed_cache import read_packed
        from lowbit.modules import QuantEmbedding, QuantLinear

        if self.quantization_config.description().attention:
            model.set_attn_implementation(IMPLEMENTATION)
        for module in model.modules():
            if isinstance(module, QuantLinear | QuantEmbedding):
                for name, (_, dtype) in module.description.layout().items():
                    # Up to transformers 5.20 classes that keep modules in float32 widen packed tensors too; exact both ways.
                    module._buffers[name] = module.get_buffer(name).to(dtype)
        tie_heads(model, self.quantization_config.description())
        check_and_prepare(self._directory, model)
        decoding.install(model)
        if self.quantization_config.description().cache:
            read_packed(model)
        return model

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """None (as stored) for tensors of packed layers, also where a model class keeps some modules in float32."""
        if any(target.startswith(self._packed) for target in converter.target_patterns):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def update_weight_conversions(self, weight_conversions: list, model: Any = None) -> list:
        """None: tensors are stored under the names of the running model, experts taken apart included."""
        return []

    def is_serializable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def register() -> None:
    """Makes the two classes known to transformers; a second call changes nothing."""
    # Here and not at the top: a reload of that module makes new mappings.
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        register_quantization_config,
        register_quantizer,
    )

    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(LowbitConfig)
        register_quantizer(METHOD)(LowbitQuantizer)
