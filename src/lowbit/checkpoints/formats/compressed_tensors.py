"""compressed-tensors, the format of vLLM and llm-compressor, as its package 0.20 reads it: ``pack-quantized`` weights.

A layer has ``weight_packed`` int32 ``[O, words]``, ``weight_scale`` ``[O, G]``, ``weight_shape``, and with zero points
``weight_zero_point`` int32 ``[words of O, G]``. The words hold unsigned codes; the package counts them from ``-2**(bits-1)``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoints.description import ModelDescription
from lowbit.checkpoints.formats.base import WithProblems, beside_codes, biases, integers, shapes
from lowbit.checkpoints.formats.directory import Layer, quantization_of, read_directory, write_directory
from lowbit.checkpoints.formats.integers import Integers, codes_of, words
from lowbit.checkpoints.packed_model import PackedLayer, PackedModel
from lowbit.modules import ActSpec
from lowbit.numerics import Int, PerChannel, PerGroup, Spec

_METHOD, _FORMAT = "compressed-tensors", "pack-quantized"
_BUFFERS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


class CompressedTensors(WithProblems):
    """Integers of 2 to 8 bits per group or channel, several formats in a model; weights only."""

    name = "compressed-tensors"
    title = "vLLM / compressed-tensors"

    def problems(self, description: ModelDescription, new_biases: Collection[str]) -> Iterator[str]:
        yield from biases(new_biases)
        yield from beside_codes(description)
        if description.unfused_experts:
            yield "experts are not written"
        for shape in shapes(description):
            if problem := _problem(*shape):
                yield problem

    def write(self, model: PackedModel, directory: Path) -> None:
        groups: dict[Spec, list[str]] = {}
        for name, layer in model.description.layers.items():
            groups.setdefault(layer.spec, []).append(name)
        config = {
            "quant_method": _METHOD,
            "format": _FORMAT,
            "quantization_status": "compressed",
            "config_groups": {f"group_{i}": _group(spec, names) for i, (spec, names) in enumerate(groups.items())},
            "ignore": [],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }
        write_directory(model, directory, config, _tensors)

    def read(self, directory: Path) -> PackedModel:
        config = quantization_of(directory, _METHOD)
        groups = config.get("config_groups") or {}
        found = {group.get("format") or config.get("format") for group in groups.values()}
        if found != {_FORMAT} or any(group.get("input_activations") for group in groups.values()):
            raise self.unreadable(directory, f"has format {', '.join(map(str, found))} or quantizes activations")
        return read_directory(directory, "weight_packed", _BUFFERS, _layer)


def _problem(spec: Spec, act: ActSpec | None, shape: tuple[int, int]) -> str:
    if problem := integers(spec, (2, 3, 4, 5, 6, 7, 8)):
        return problem
    if not isinstance(spec.granularity, PerGroup | PerChannel):
        return f"its weights are per group or channel, not {spec.granularity}"
    if isinstance(spec.granularity, PerGroup) and shape[1] % spec.granularity.size:
        return f"its groups divide a row; {spec.granularity.size} does not divide {shape[1]}"
    return "" if act is None else "quantized activations are not written; leave activation_bits out"


def _group(spec: Spec, names: list[str]) -> dict[str, Any]:
    assert isinstance(spec.grid, Int)
    size = spec.granularity.size if isinstance(spec.granularity, PerGroup) else None
    weights = {
        "num_bits": spec.grid.bits,
        "type": "int",
        "symmetric": spec.grid.symmetric,
        "strategy": "channel" if size is None else "group",
        "group_size": size,
        "dynamic": False,
    }
    return {
        "targets": names,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": _FORMAT,
    }


def _tensors(part: PackedLayer) -> dict[str, Tensor]:
    weight = Integers.of(part.description, part.tensors)
    tensors = {
        "weight_packed": words(weight.codes, weight.bits),
        "weight_scale": weight.scale,
        "weight_shape": torch.tensor(part.description.shape, dtype=torch.int64),
    }
    if weight.zero is not None:
        tensors["weight_zero_point"] = words(weight.zero.T, weight.bits).T.contiguous()
    return tensors | ({"bias": part.tensors["bias"]} if part.description.bias is not None else {})


def _layer(name: str, tensors: Mapping[str, Tensor]) -> Layer:
    rows, columns = tensors["weight_shape"].tolist()
    packed, scale = tensors["weight_packed"], tensors["weight_scale"]
    # Dense words have ceil(columns * bits / 32) of a row.
    bits = next(b for b in range(2, 9) if -(-columns * b // 32) == packed.shape[1])
    zero = tensors.get("weight_zero_point")
    if zero is not None:
        zero = codes_of(zero.T, bits, rows).T
    codes = codes_of(packed, bits, columns)
    return Integers(bits, columns // scale.shape[1], codes, scale, zero).layer(tensors.get("bias"))
