"""The packed cache of a model: its format, fitted to the model's keys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from lowbit.architectures import IMPLEMENTATION, for_config, simulated_layers
from lowbit.caches import CacheGradients, Coordinates, PackedCache, PackedLayer, calibrated_coordinates, format_of
from lowbit.caches.rotary import frequencies
from lowbit.modules import KVFormats, KVRule, KVSpec, calibrations
from lowbit.modules.kv_spec import LEAST_TOKENS
from lowbit.numerics import Block, PerTensor

LARGE = 16.0
"""A key bias of this magnitude dwarfs what varies from token to token, which is of the order of one."""


def packed_cache(
    model: nn.Module | PreTrainedConfig, spec: KVSpec | None, overrides: Sequence[KVRule] = ()
) -> PackedCache:
    """An empty cache for ``model``, or for its configuration, in these formats.

    Raises:
        ValueError: formats that need a calibration which the model does not carry; see :class:`~lowbit.caches.PackedCache`.
    """
    if isinstance(model, PreTrainedConfig):
        cache = PackedCache(model, spec, overrides)
        _coordinates(cache, None)
        return cache
    config: Any = model.config
    biases = {layer: _tensor(model, name) for layer, name in key_biases(config).items()}
    rules = (*overrides, *rules_for_biases(config, biases, spec, overrides))
    cache = PackedCache(config, spec, rules)
    if found := _coordinates(cache, model):
        cache = PackedCache(config, spec, rules, found)
    cache.stay_packed(config.get_text_config(decoder=True)._attn_implementation == IMPLEMENTATION)
    return cache


@contextmanager
def simulated_cache(
    model: nn.Module, formats: KVFormats, gradients: CacheGradients = CacheGradients()
) -> Iterator[None]:
    """While open, ``model`` computes for whole windows, with gradients, what it gives token by token through a cache in
    ``formats``; see :func:`~lowbit.architectures.simulated_layers`.

    Raises:
        ValueError: formats that the model cannot have; a model whose attention cannot be simulated.
    """
    if not formats:
        yield
        return
    with simulated_layers(model, packed_cache(model, formats.kv, formats.overrides).packed_layers, gradients):
        yield


def check_calibrated(model: nn.Module, spec: KVSpec | None, overrides: Sequence[KVRule] = ()) -> None:
    """Checks that ``model`` carries all that these formats of its cache need of calibration. Reads no values.

    Raises:
        ValueError: it does not; see :class:`~lowbit.caches.PackedCache` too.
    """
    config: Any = model.config
    _coordinates(PackedCache(config, spec, overrides), model)


def _coordinates(cache: PackedCache, model: nn.Module | None) -> dict[int, tuple[Coordinates, Coordinates]]:
    """By layer, what calibration has found for the layers of ``cache`` whose formats need it."""
    forms = {i: layer.spec for i, layer in enumerate(cache.layers) if isinstance(layer, PackedLayer)}
    needy = {i: form for i, form in forms.items() if form.calibrated}
    if not needy:
        return {}
    found = (
        {}
        if model is None
        else {getattr(each, "layer_idx", None): calibration for _, each, calibration in calibrations(model)}
    )
    if missing := [
        i for i, form in needy.items() if i not in found or form.calibrated.difference(found[i].spec.buffers)
    ]:
        raise uncalibrated(
            needy[missing[0]].calibrated, f" for layers {missing[:5]}{' ...' if len(missing) > 5 else ''}"
        )
    return {i: calibrated_coordinates(form, found[i]) for i, form in needy.items()}


def uncalibrated(parts: Iterable[str], where: str = "") -> ValueError:
    """The error for a model that does not carry ``parts`` of the calibration that its cache needs."""
    named = ", ".join(sorted(parts)).replace("_", " ")
    return ValueError(
        f"the cache needs what only calibration finds ({named}), and the model does not carry it{where}: quantize the model with "
        "this cache and calibration text (lowbit quantize MODEL --kv NAME --calibration TEXT -o DIR) and use the checkpoint, or "
        "choose a method for caches that needs no data"
    )


def read_packed(model: Any) -> None:
    """Lets attention read packed tokens where they are, in a model that attends by torch's function through transformers'
    interface; in all others they are decoded for each call."""
    if model._supports_attention_backend and model.config.get_text_config(decoder=True)._attn_implementation == "sdpa":
        model.set_attn_implementation(IMPLEMENTATION)


def key_biases(config: Any) -> dict[int, str]:
    """The name of the bias of each layer's key projection, in a model that has such projections; some may have no bias."""
    table = for_config(config)
    path = next((entry.path for entry in table.linears if entry.role == "k"), None)
    count = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0)
    return {} if path is None else {i: f"{table.blocks}.{i}.{path}.bias" for i in range(count)}


def _tensor(model: nn.Module, name: str) -> Tensor | None:
    owner, _, leaf = name.rpartition(".")
    try:
        return getattr(model.get_submodule(owner), leaf, None)
    except AttributeError:  # a layer of another kind than attention
        return None


def rules_for_biases(
    config: Any, biases: Mapping[int, Tensor | None], spec: KVSpec | None, overrides: Sequence[KVRule] = ()
) -> tuple[KVRule, ...]:
    """Rules for the layers whose key projection has a bias that is :data:`LARGE` somewhere.

    Their keys are packed before the rotary embedding, where a bias is the same for every token, and centred, which takes it
    off. After the embedding it turns with the position, and 4 bits hold little else (transformers' own 4-bit cache on
    Qwen2.5 answers nothing right). A bias without values, of a skeleton, has no rule.
    """
    text = config.get_text_config(decoder=True)
    try:
        frequencies(text, 2)
        turns = True
    except ValueError:
        turns = False
    rules = []
    for i, bias in biases.items():
        form = format_of(i, text.num_hidden_layers, spec, overrides)
        if form is None or form.key is None or bias is None or bias.is_meta or bias.abs().max() < LARGE:
            continue
        in_blocks = isinstance(form.key.granularity, Block) or isinstance(form.value and form.value.granularity, Block)
        static = isinstance(form.key.granularity, PerTensor)  # a range that was found holds for keys with their means
        recent = form.recent if in_blocks or static else max(form.recent, LEAST_TOKENS)
        fitted = replace(form, before_rope=turns, centred=not static and recent >= LEAST_TOKENS, recent=recent)
        if fitted != form:  # a checkpoint's own formats are fitted already
            rules.append(KVRule((i,), fitted))
    return tuple(rules)
