"""The format of peft: the packed base as a native checkpoint, and its low-rank terms as an adapter in peft's own files.

The adapter lies in the folder ``adapter``: beside the weights transformers would take it for a part of the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from lowbit.adapters import apart, has_terms, why_inseparable, without_terms
from lowbit.checkpoints.description import ModelDescription
from lowbit.checkpoints.formats.base import WithProblems
from lowbit.checkpoints.native import Native
from lowbit.checkpoints.packed_model import PackedLayer, PackedModel, PlainTensor
from lowbit.modules import QuantLinear

ADAPTER = "adapter"
"""The folder of the adapter."""


class Peft(WithProblems):
    """A packed base and an adapter for ``PeftModel.from_pretrained(lowbit.load(DIR), DIR/adapter)``."""

    name = "peft"
    title = "packed base and an adapter of peft"
    holds_tables = True

    def problems(self, description: ModelDescription, new_biases: Collection[str]) -> Iterator[str]:
        adapted = [layer for layer in description.layers.values() if has_terms(layer)]
        if not adapted:
            yield "no layer has low-rank terms, as those that were trained with qlora have"
        yield from (reason for layer in adapted if (reason := why_inseparable(layer)))

    def write(self, model: PackedModel, directory: Path) -> None:
        try:
            from peft import LoraConfig
        except ImportError:
            raise ValueError("the format peft needs the package peft. Run: pip install 'lowbit[adapters]'") from None
        layers = {name: without_terms(layer) for name, layer in model.description.layers.items()}
        factors: dict[str, tuple[Tensor, Tensor]] = {}

        def parts() -> Iterator[PackedLayer | PlainTensor]:
            for part in model.parts():
                if isinstance(part, PackedLayer) and part.name in layers and has_terms(part.description):
                    base, a_RI, b_OR = apart(QuantLinear(part.description, part.tensors))
                    factors[part.name] = a_RI, b_OR
                    part = PackedLayer(part.name, base.description, dict(base.state_dict()))
                yield part

        Native().write(replace(model, description=replace(model.description, layers=layers), parts=parts), directory)
        ranks = {name: len(a_RI) for name, (a_RI, _) in factors.items()}
        usual = Counter(ranks.values()).most_common(1)[0][0]
        others = {name: rank for name, rank in ranks.items() if rank != usual}
        # alpha is the rank: what training scaled is in b already.
        config = LoraConfig(
            r=usual,
            lora_alpha=usual,
            target_modules=sorted(ranks),
            rank_pattern=others,
            alpha_pattern=others,
            task_type="CAUSAL_LM",
            inference_mode=True,
        )
        config.save_pretrained(str(directory / ADAPTER))
        tensors = {}
        for name, (a_RI, b_OR) in factors.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = a_RI
            tensors[f"base_model.model.{name}.lora_B.weight"] = b_OR
        save_file(tensors, directory / ADAPTER / "adapter_model.safetensors", {"format": "pt"})

    def read(self, directory: Path) -> PackedModel:
        raise self.unreadable(directory, "an adapter that stands beside its base")
