"""Puts what a description names into a model without weights, before a checkpoint fills it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lowbit.architectures import quantize_attention
from lowbit.checkpoints.description import ModelDescription
from lowbit.decoding.packed_cache import check_calibrated
from lowbit.modules import (
    AttentionSpec,
    CalibrationSpec,
    LinearDescription,
    QuantEmbedding,
    QuantLinear,
    calibrate_cache,
    scale_of,
    set_kv_formats,
    turn_residual,
)


def swap(model: nn.Module, description: ModelDescription) -> dict[str, QuantLinear | QuantEmbedding]:
    """Puts empty packed layers in the places that ``description`` names, in place; the new modules by name.

    Works on the meta device. Linears, GPT-2's Conv1D and, where the description says so, experts taken apart first.
    A model without the head that the checkpoint was written with is found under the names without its prefix.

    Raises:
        ValueError: a name that the model does not have, a place that holds another kind of module or another width, or formats
            of a cache that the model does not have, or that need more calibration than is described.
    """
    if description.unfused_experts:
        from lowbit.architectures.experts import unfuse_experts  # the common model has no experts, and need not load it

        unfuse_experts(model)
    _untie(model, {_find(model, written)[0] for written in description.layers})
    swapped: dict[str, QuantLinear | QuantEmbedding] = {}
    for written, layer_description in description.layers.items():
        name, old = _find(model, written)
        device = _check_place(model, name, old, layer_description)
        parent, _, leaf = name.rpartition(".")
        layer = QuantLinear.empty(layer_description, device).train(old.training)
        setattr(model.get_submodule(parent), leaf, layer)
        swapped[name] = layer
    for written, table_description in description.embeddings.items():
        name, old = _find(model, written)
        swapped[name] = _swap_table(model, name, old, table_description)
        for head in (head for head, table in description.tied_heads.items() if table == written):
            _swap_tied_head(model, head, table_description)
    for written, spec in description.attention.items():
        name, module = _find(model, written)
        _check_heads(model, name, module, spec)
        quantize_attention(module, spec)
    if description.residual is not None:
        turn_residual(model, replace(description.residual, blocks=_find(model, description.residual.blocks)[0]))
    for written, calibration in description.kv_calibration.items():
        name, module = _find(model, written)
        _check_cache_heads(model, name, module, calibration)
        calibrate_cache(module, calibration)
    if description.cache:
        check_calibrated(model, description.kv, description.kv_overrides)
        set_kv_formats(model, description.cache)
    return swapped


def _swap_table(model: Any, name: str, old: nn.Module, description: LinearDescription) -> QuantEmbedding:
    scale, weight = scale_of(old), old._parameters.get("weight")
    if scale is None or weight is None or tuple(weight.shape) != description.shape:
        raise ValueError(
            f"the checkpoint packs the embedding {name} {list(description.shape)}, which is a {type(old).__name__} "
            f"{[] if weight is None else list(weight.shape)} here"
        )
    table = QuantEmbedding.empty(description, weight.device, weight.dtype, scale)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, table)
    return table


def _swap_tied_head(model: Any, name: str, description: LinearDescription) -> None:
    """A head around the buffers of its embedding: :func:`tie_heads` gives it those when they are loaded."""
    try:
        old = model.get_submodule(name)
    except AttributeError:  # a model without the head that the checkpoint was written with
        return
    if not isinstance(old, nn.Linear) or old.bias is not None or tuple(old.weight.shape) != description.shape:
        raise ValueError(f"the checkpoint ties {name} to its embedding {list(description.shape)}, it is {old} here")
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, QuantLinear.empty(description, old.weight.device).tied())
    for tied in [key for key in model.all_tied_weights_keys if key == f"{name}.weight"]:
        del model.all_tied_weights_keys[tied]
    model._tied_weights_keys = {}  # transformers would tie parameters that are not there any more


def tie_heads(model: nn.Module, description: ModelDescription) -> None:
    """Gives output heads the buffers of the packed embeddings that they are. For a model that :func:`swap` changed."""
    for written, table in description.tied_heads.items():
        try:
            head = model.get_submodule(written)
        except AttributeError:
            continue
        embedding = _find(model, table)[1]
        assert isinstance(head, QuantLinear) and isinstance(embedding, QuantEmbedding)
        for name, buffer in embedding.packed().items():
            head._buffers[name] = buffer


def _untie(model: nn.Module, quantized: set[str]) -> None:
    """Linears of several blocks that shared a weight have codes of their own each."""
    tied = getattr(model, "all_tied_weights_keys", {})
    for name, other in list(tied.items()):
        if name.rpartition(".")[0] in quantized and other.rpartition(".")[0] in quantized:
            del tied[name]


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


def _check_heads(model: nn.Module, name: str, module: nn.Module, spec: AttentionSpec) -> None:
    if not hasattr(module, "is_causal"):
        raise ValueError(
            f"the checkpoint quantizes the operands of {name}, which is a {type(module).__name__} and no attention"
        )
    heads = _heads(model, module)
    if spec.heads is not None and any(b is not None and a != b for a, b in zip(spec.heads, heads, strict=False)):
        raise ValueError(f"{name} has the heads {list(spec.heads)} in the checkpoint, {[*heads]} here")


def _check_cache_heads(model: nn.Module, name: str, module: nn.Module, spec: CalibrationSpec) -> None:
    if not isinstance(getattr(module, "layer_idx", None), int):
        raise ValueError(
            f"the checkpoint carries the calibration of the cache of {name}, which is a {type(module).__name__} without a number"
        )
    _, count, dim = _heads(model, module)
    if (count is not None and spec.heads[0] != count) or (dim is not None and spec.heads[1] != dim):
        raise ValueError(
            f"{name} has {spec.heads[0]} key-value heads of {spec.heads[1]} channels in the checkpoint, {count} of {dim} here"
        )


def _heads(model: nn.Module, module: nn.Module) -> tuple[int | None, int | None, int | None]:
    """Query heads, key-value heads and channels of a head of an attention module, as far as it and the config say."""
    config: Any = getattr(module, "config", None) or getattr(model, "config", None)
    query = getattr(config, "num_attention_heads", None)
    return query, getattr(config, "num_key_value_heads", None) or query, getattr(module, "head_dim", None)


def _check_place(model: nn.Module, name: str, old: nn.Module, description: LinearDescription) -> torch.device:
    weight = old._parameters.get("weight")
    if weight is None or weight.dim() != 2 or isinstance(old, nn.Embedding):
        raise ValueError(f"the checkpoint quantizes {name}, which is a {type(old).__name__} and not a linear")
    # GPT-2's Conv1D holds [in, out]; every other linear [out, in].
    widths = tuple(weight.shape) if type(old).__name__ == "Conv1D" else tuple(weight.shape)[::-1]
    if widths != description.features:
        raise ValueError(
            f"{name} maps {description.features[0]} channels to {description.features[1]} in the checkpoint, {widths} here"
        )
    if f"{name}.weight" in getattr(model, "all_tied_weights_keys", {}):
        raise ValueError(f"{name} is quantized but its weight is tied; set tie_word_embeddings to false in config.json")
    return weight.device
