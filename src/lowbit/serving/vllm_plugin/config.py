"""Native checkpoints in vLLM: which of its layers are packed, and what of a checkpoint its path cannot run."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear, UnquantizedLinearMethod  # pyright: ignore
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig  # pyright: ignore
from vllm.model_executor.layers.vocab_parallel_embedding import (  # pyright: ignore
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import WeightsMapper  # pyright: ignore
from vllm.platforms import current_platform  # pyright: ignore

from lowbit.checkpoints.description import METHOD, ModelDescription
from lowbit.modules import LinearDescription
from lowbit.serving.vllm_plugin.methods import PackedEmbedding, PackedLinear, TiedHead
from lowbit.serving.vllm_plugin.refusals import why_not_served


class NativeConfig(QuantizationConfig):
    """The ``quantization_config`` of a native checkpoint, as vLLM asks it for each of its layers.

    Raises:
        ValueError: a damaged description, or parts of a model that vLLM computes without asking.
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.description = ModelDescription.from_json(config)
        reason = why_not_served(self.description)
        if not current_platform.is_cpu():
            reason = "the plug-in has products for CPUs, and this vLLM runs on another device"
        if reason:
            raise ValueError(
                f"vLLM cannot run this lowbit checkpoint: {reason}. lowbit serve DIR --engine transformers can"
            )

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> NativeConfig:
        return cls(config)

    @staticmethod
    def get_cache_scale_mapper() -> WeightsMapper:
        """None: no tensor of ours is a scale of vLLM's cache, whatever it is called."""
        return WeightsMapper()

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        return WeightsMapper()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """How ``layer`` computes: packed where the checkpoint says so, as vLLM has it otherwise."""
        if isinstance(layer, LinearBase):
            parts = self._parts(layer, prefix)
            return PackedLinear(prefix, parts) if parts else UnquantizedLinearMethod()
        if isinstance(layer, ParallelLMHead):
            if prefix in self.description.tied_heads:
                return TiedHead(prefix)
            head = self.description.layers.get(prefix)
            return None if head is None else PackedEmbedding(prefix, head)
        if isinstance(layer, VocabParallelEmbedding):  # most models do not tell it its name
            tables = {n: d for n, d in self.description.embeddings.items() if n == prefix or not prefix}
            if len(tables) > 1:
                raise ValueError(f"{len(tables)} packed embeddings, of which vLLM does not say which it makes")
            return next((PackedEmbedding(name, table) for name, table in tables.items()), None)
        return None

    def _parts(self, layer: LinearBase, prefix: str) -> dict[str, LinearDescription]:
        """The packed layers that ``layer`` fuses, in its order; empty where it is not packed.

        Raises:
            ValueError: layers that are only in part packed, or fused in an order that is not known.
        """
        parent, dot, leaf = prefix.rpartition(".")
        names = [f"{parent}{dot}{name}" for name in self.packed_modules_mapping.get(leaf, [leaf])]
        packed = {name: self.description.layers[name] for name in names if name in self.description.layers}
        if packed and len(packed) < len(names):
            absent = ", ".join(name for name in names if name not in packed)
            raise ValueError(
                f"vLLM computes {', '.join(names)} as one, and {absent} is not packed; quantize all of them"
            )
        if packed and isinstance(layer, QKVParallelLinear) and len(names) == 1:
            raise ValueError(
                f"{prefix} holds queries, keys and values in one matrix, in an order that vLLM changes; serve it with "
                "--engine transformers"
            )
        return packed
