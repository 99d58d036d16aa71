"""The quantized cache of one block, for recipes whose blocks learn with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from lowbit.architectures import attention_modules, simulated_layers
from lowbit.caches import PackedCache, PackedLayer, calibrated_coordinates
from lowbit.decoding.packed_cache import key_biases, rules_for_biases
from lowbit.modules import cache_calibration
from lowbit.plan.model_plan import ModelPlan


def cache_layers(plan: ModelPlan, i: int, block: nn.Module) -> dict[str, PackedLayer]:
    """Empty layers of the cache of block i, by path of its attention module, in formats that fit its keys."""
    formats, config = plan.recipe.scheme.cache, plan.source.config
    if not formats:
        return {}
    name = plan.blocks[i].name
    named = {j: key for j, key in key_biases(config).items() if key.startswith(f"{name}.")}
    parameters = dict(block.named_parameters())
    biases = {j: parameters.get(key.removeprefix(f"{name}.")) for j, key in named.items()}
    rules = rules_for_biases(config, biases, formats.kv, formats.overrides)
    layers = PackedCache(config, formats.kv, (*formats.overrides, *rules)).packed_layers
    numbers = {
        path: getattr(block.get_submodule(path), "layer_idx", None)
        for path in attention_modules(plan.blocks[i].resolved)
    }
    return {path: layers[j] for path, j in numbers.items() if j in layers and layers[j].packs}


@contextmanager
def reading_cache(block: nn.Module, caches: Mapping[str, PackedLayer]) -> Iterator[None]:
    """While open, ``block`` attends as if each token were decoded from ``caches``, as its steps have read them."""
    if not caches:
        yield
        return
    layers: dict[int, PackedLayer] = {}
    for path, layer in caches.items():
        module: Any = block.get_submodule(path)
        found = cache_calibration(module)
        coordinates = (None, None) if found is None else calibrated_coordinates(layer.spec, found)
        layers[module.layer_idx] = layer.with_coordinates(*coordinates)
    with simulated_layers(block, layers):
        yield
