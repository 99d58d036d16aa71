"""What a native checkpoint says of itself: the ``quantization_config`` of its config.json.

    {"quant_method": "lowbit", "version": 1,
     "schemes": [description of a packed linear, ...], "layers": {module name: index into schemes, ...},
     "unfused_experts": true,                                  (only where experts were taken apart)
     "attention": [[formats of its operands, [module that attends, ...]], ...],       (only where they are quantized)
     "residual": {"type": "RandomHadamard", "seed": 1, "size": 576, "blocks": "model.layers"}}  (only where it is rotated)

It says what is stored, never how it was chosen. Blocks repeat, so a model of hundreds of layers has a handful of
schemes. Everything is written in sorted order: the same model gives the same bytes.

Version 2 is version 1 with layers that transform their output or have side terms. Version 3 is of models whose attention
quantizes its operands, or whose residual stream is rotated between their first block and their last. Readers of an older
version would pass these over, so the oldest that says everything is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lowbit.architectures import attention_spec, quantize_attention
from lowbit.modules import (
    AttentionSpec,
    KVSpec,
    QuantLinear,
    buffer_layout,
    features,
    residual_of,
    rotation_of,
    turn_residual,
)
from lowbit.modules.kv_spec import unsupported
from lowbit.modules.quant_linear import Config
from lowbit.numerics import from_dict, to_dict

METHOD = "lowbit"
VERSIONS = (1, 2, 3)


def quantization_config(
    layers: nn.Module | Mapping[str, QuantLinear] | Mapping[str, Config],
    *,
    unfused_experts: bool = False,
    attention: Mapping[str, AttentionSpec] | None = None,
    residual: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The description of a model, or of layers (or only their :meth:`QuantLinear.config`) by module name.

    ``unfused_experts``: the checkpoint's names are those of a model whose experts were taken apart. ``attention``: formats of
    attention's operands by name of the module that attends. ``residual``: the rotation of the stream between the blocks, as
    :func:`lowbit.modules.described_residual` says it. Both are a model's own where ``layers`` is one.

    Raises:
        ValueError: nothing is quantized.
    """
    if isinstance(layers, nn.Module):
        residual = residual_of(layers)
        specs = {name: attention_spec(module) for name, module in layers.named_modules()}
        attention = {name: spec for name, spec in specs.items() if spec is not None}
        layers = {name: module for name, module in layers.named_modules() if isinstance(module, QuantLinear)}
    if not layers:
        raise ValueError("no layer is quantized; expected at least one QuantLinear")
    schemes: dict[str, int] = {}
    numbers = {}
    for name in sorted(layers, key=_natural):
        layer = layers[name]
        scheme = json.dumps(layer.config() if isinstance(layer, QuantLinear) else layer, sort_keys=True)
        numbers[name] = schemes.setdefault(scheme, len(schemes))
    written = {
        "quant_method": METHOD,
        "version": 3 if attention or residual else 2 if any(_extended(json.loads(s)) for s in schemes) else 1,
        "schemes": [json.loads(s) for s in schemes],
        "layers": numbers,
    }
    written |= {"unfused_experts": True} if unfused_experts else {}
    by_spec: dict[AttentionSpec, list[str]] = {}
    for name in sorted(attention or {}, key=_natural):
        by_spec.setdefault((attention or {})[name], []).append(name)
    written |= {"attention": [[to_dict(spec), names] for spec, names in by_spec.items()]} if attention else {}
    return written | ({"residual": dict(residual)} if residual else {})


def _extended(config: Config) -> bool:
    return bool(config.get("post") or config.get("side"))


def layer_configs(description: Mapping[str, Any]) -> dict[str, Config]:
    """Each layer's description by module name.

    Raises:
        ValueError: another method, a version this code does not know, or a damaged description.
    """
    if description.get("quant_method") != METHOD:
        raise ValueError(f"quant_method is {description.get('quant_method')!r}, expected {METHOD!r}")
    if description.get("version") not in VERSIONS:
        raise ValueError(
            f"the checkpoint is of version {description.get('version')!r} of the native format, this lowbit reads "
            f"versions {VERSIONS[0]} to {VERSIONS[-1]}; use a lowbit that wrote such checkpoints"
        )
    if description.get("kv") is not None:
        raise ValueError(unsupported(from_dict(description["kv"], KVSpec), "the checkpoint"))
    schemes, layers = description.get("schemes"), description.get("layers")
    if not isinstance(schemes, list | tuple) or not isinstance(layers, Mapping) or not layers:
        raise ValueError("quantization_config is damaged: expected a list 'schemes' and an object 'layers'")
    for scheme in schemes:
        buffer_layout(scheme)  # raises where no layer is like that
    if "residual" in description:
        rotation_of(description["residual"])
    for name, number in layers.items():
        if not isinstance(number, int) or not 0 <= number < len(schemes):
            raise ValueError(f"quantization_config is damaged: {name} has scheme {number!r} of {len(schemes)}")
    return {name: schemes[number] for name, number in layers.items()}


def attention_specs(description: Mapping[str, Any]) -> dict[str, AttentionSpec]:
    """The formats of attention's operands, by name of the module that attends. Raises ValueError where they are damaged."""
    found: dict[str, AttentionSpec] = {}
    for entry in description.get("attention", ()):
        if not isinstance(entry, list | tuple) or len(entry) != 2 or not isinstance(entry[1], list | tuple):
            raise ValueError(
                f"quantization_config is damaged: expected [formats, [names]] of attention, found {entry!r}"
            )
        spec = from_dict(entry[0])
        if not isinstance(spec, AttentionSpec):
            raise ValueError(f"quantization_config is damaged: {entry[0]!r} is no format of attention's operands")
        found |= dict.fromkeys(entry[1], spec)
    return found


def swap(model: nn.Module, description: Mapping[str, Any]) -> dict[str, QuantLinear]:
    """Puts empty packed layers in the places that ``description`` names, in place; the new layers by module name.

    Works on the meta device. Linears, GPT-2's Conv1D and, where the description says so, experts taken apart first.
    A model without the head that the checkpoint was written with is found under the names without its prefix.

    Raises:
        ValueError: a name that the model does not have, or a place that holds another kind of module or another width.
    """
    configs = layer_configs(description)
    if description.get("unfused_experts"):
        from lowbit.architectures.experts import unfuse_experts  # the common model has no experts, and need not load it

        unfuse_experts(model)
    swapped = {}
    for written, config in configs.items():
        name, old = _find(model, written)
        device = _check_place(model, name, old, config)
        parent, _, leaf = name.rpartition(".")
        layer = QuantLinear.empty(config, device).train(old.training)
        setattr(model.get_submodule(parent), leaf, layer)
        swapped[name] = layer
    for written, spec in attention_specs(description).items():
        quantize_attention(_find(model, written)[1], spec)
    if (residual := description.get("residual")) is not None:
        turn_residual(model, _find(model, residual["blocks"])[0], rotation_of(residual))
    return swapped


def _find(model: nn.Module, name: str) -> tuple[str, nn.Module]:
    prefix = getattr(model, "base_model_prefix", "") + "."
    for candidate in (name, name.removeprefix(prefix)):
        try:
            return candidate, model.get_submodule(candidate)
        except AttributeError:
            continue
    raise ValueError(
        f"the checkpoint changes {name}, which {type(model).__name__} does not have: another model's checkpoint"
    )


def _check_place(model: nn.Module, name: str, old: nn.Module, config: Config) -> torch.device:
    weight = old._parameters.get("weight")
    if weight is None or weight.dim() != 2 or isinstance(old, nn.Embedding):
        raise ValueError(f"the checkpoint quantizes {name}, which is a {type(old).__name__} and not a linear")
    # GPT-2's Conv1D holds [in, out]; every other linear [out, in].
    found = tuple(weight.shape) if type(old).__name__ == "Conv1D" else tuple(weight.shape)[::-1]
    if found != features(config):
        raise ValueError(
            f"{name} maps {features(config)[0]} channels to {features(config)[1]} in the checkpoint, {found} here"
        )
    if f"{name}.weight" in getattr(model, "all_tied_weights_keys", {}):
        raise ValueError(f"{name} is quantized but its weight is tied; set tie_word_embeddings to false in config.json")
    return weight.device


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts ``layers.10`` after ``layers.9``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"\.", name)]
