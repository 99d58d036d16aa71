"""bitsandbytes, as transformers stores it: NF4 and FP4 by blocks of the flattened weight, and LLM.int8().

4 bits: ``weight`` uint8 ``[n / 2, 1]``, the first of two codes in the high half; ``weight.absmax`` float32 ``[blocks]`` and
``weight.quant_map`` float32 ``[16]``; ``weight.quant_state.bitsandbytes__nf4`` (or ``__fp4``), the bytes of a JSON object. With double
quantization absmax is uint8, ``weight.nested_quant_map`` [256] and ``weight.nested_absmax`` place it, and the object has the mean.

8 bits: ``weight`` int8 ``[O, I]``, ``SCB`` float32 ``[O]``, the largest magnitude of a row: 127 times the scale.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoints.description import ModelDescription
from lowbit.checkpoints.formats.base import WithProblems, beside_codes, biases, shapes
from lowbit.checkpoints.formats.directory import Layer, in_blocks, quantization_of, read_directory, write_directory
from lowbit.checkpoints.packed_model import PackedLayer, PackedModel
from lowbit.layouts import pack, unpack
from lowbit.modules import ActSpec, LinearDescription
from lowbit.numerics import DYNAMIC_MAP, FP4, NF4, Flat, Int, PerChannel, PerGroup, PerToken, Spec

_TABLES = {"nf4": NF4, "fp4": FP4}
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_NESTED = Spec(DYNAMIC_MAP, Flat(256), scale_dtype="float32")
_STATE = "weight.quant_state.bitsandbytes__"
_BUFFERS = (
    "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
    *(f"{_STATE}{kind}" for kind in _TABLES), "SCB", "weight_format",
)  # fmt: skip


class BitsAndBytes(WithProblems):
    """NF4 or FP4 with or without double quantization, or integers of 8 bits with quantized inputs; one of them for all layers."""

    name = "bitsandbytes"
    title = "bitsandbytes"

    def problems(self, description: ModelDescription, new_biases: Collection[str]) -> Iterator[str]:
        yield from biases(new_biases)
        yield from beside_codes(description)
        if description.unfused_experts:
            yield "experts are not written"
        distinct = shapes(description)
        for spec, act, _ in distinct:
            if problem := _problem(spec, act):
                yield problem
        if len({(_flat(spec), act) for spec, act, _ in distinct}) > 1:
            yield "it has one format for all layers, the model several (--head-bits 16 leaves the head as it is)"

    def write(self, model: PackedModel, directory: Path) -> None:
        first = next(iter(model.description.layers.values()))
        four, dtype = _kind(first.spec) is not None, str(model.config.get("dtype") or "float32")
        config: dict[str, Any] = {"quant_method": "bitsandbytes", "load_in_4bit": four, "load_in_8bit": not four}
        if four:
            config |= {
                "bnb_4bit_quant_type": _kind(first.spec),
                "bnb_4bit_use_double_quant": first.spec.stats is not None,
                "bnb_4bit_compute_dtype": dtype,
                "bnb_4bit_quant_storage": "uint8",
            }
        else:
            config |= {"llm_int8_threshold": first.act.threshold if first.act is not None else 0.0}

        def said(plain: list[str]) -> dict[str, Any]:
            head = [] if "lm_head" in model.description.layers else ["lm_head"]
            return config | {"llm_int8_skip_modules": [*head, *in_blocks(plain, model.description)]}

        write_directory(model, directory, said, partial(_tensors, dtype))

    def read(self, directory: Path) -> PackedModel:
        config = quantization_of(directory, "bitsandbytes")
        if config.get("load_in_4bit") and str(config.get("bnb_4bit_quant_storage", "uint8")) != "uint8":
            raise self.unreadable(directory, f"keeps codes as {config['bnb_4bit_quant_storage']}")
        if config.get("load_in_4bit"):
            return read_directory(directory, "weight.absmax", _BUFFERS, _read_4)
        return read_directory(
            directory, "SCB", _BUFFERS, partial(_read_8, float(config.get("llm_int8_threshold", 6.0)))
        )


def _kind(spec: Spec) -> str | None:
    """nf4 or fp4."""
    return next((kind for kind, table in _TABLES.items() if spec.grid == table), None)


def _flat(spec: Spec) -> Spec:
    """``spec`` with runs of rows as runs of the flattened weight, which they are where they divide a row."""
    return replace(spec, granularity=Flat(spec.granularity.size)) if isinstance(spec.granularity, PerGroup) else spec


def _problem(spec: Spec, act: ActSpec | None) -> str:
    grid, grain = spec.grid, spec.granularity
    if _kind(spec) is not None:
        if act is not None:
            return "it does not quantize inputs of 4-bit layers; leave activation_bits out"
        if not isinstance(grain, Flat) or grain.size not in _BLOCKS:
            return f"its blocks of the flattened weight have {', '.join(map(str, _BLOCKS))} weights, not {grain}"
        if (
            (spec.stats not in (None, _NESTED))
            or spec.scale_dtype != "float32"
            or spec.stats_centred != bool(spec.stats)
        ):
            return "its scales are float32, or 8 bits as double_quant=true makes them"
        return ""
    if (
        not isinstance(grid, Int)
        or grid.bits != 8
        or not grid.symmetric
        or not isinstance(grain, PerChannel)
        or spec.stats
    ):
        return "its weights are NF4, FP4 or symmetric integers of 8 bits with a scale for each row"
    if act is None:
        return "it quantizes the inputs of 8-bit layers, each token to 8 bits (--method llm-int8)"
    inner = act.spec
    if inner.grid != Int(8, symmetric=True) or not isinstance(inner.granularity, PerToken) or act.static or inner.stats:
        return "it quantizes inputs of 8-bit layers to symmetric integers of 8 bits, each token by its own range"
    return ""


def _tensors(dtype: str, part: PackedLayer) -> dict[str, Tensor]:
    layer, buffers = part.description, part.tensors
    bias = {"bias": buffers["bias"]} if layer.bias is not None else {}
    kind = _kind(layer.spec)
    if kind is None:
        codes = unpack(buffers["codes"], 8, layer.shape[1])
        return bias | {
            "weight": (codes.to(torch.int16) - 128).to(torch.int8),
            "SCB": _largest(buffers["scale"].float().reshape(-1)),
            "weight_format": torch.tensor(0, dtype=torch.uint8),  # rows
        }
    codes = unpack(buffers["codes"], 4, layer.shape[1]).reshape(-1)
    if len(codes) % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    assert isinstance(layer.spec.granularity, Flat)
    state: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": layer.spec.granularity.size,
        "dtype": dtype,
        "shape": list(layer.shape),
    }
    tensors = {
        "weight": (codes[::2] << 4 | codes[1::2]).view(-1, 1),
        "weight.quant_map": torch.tensor(_TABLES[kind].values),
    }
    if layer.spec.stats is None:
        tensors["weight.absmax"] = buffers["scale"].reshape(-1)
    else:
        tensors |= {
            "weight.absmax": buffers["scale_codes"].reshape(-1),
            "weight.nested_absmax": buffers["scale_scale"].reshape(-1),
            "weight.nested_quant_map": torch.tensor(DYNAMIC_MAP.values),
        }
        mean = buffers["scale_mean"].item()
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": mean}
    said = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    return bias | tensors | {f"{_STATE}{kind}": said}


def _read_4(name: str, tensors: Mapping[str, Tensor]) -> Layer:
    kind = next((kind for kind in _TABLES if f"{_STATE}{kind}" in tensors), None)
    if kind is None:
        raise ValueError(f"no {_STATE}nf4 or fp4")
    state = json.loads(bytes(tensors[f"{_STATE}{kind}"].tolist()))
    rows, columns = state["shape"]
    _same_table(tensors["weight.quant_map"], _TABLES[kind].values, kind)
    halves = tensors["weight"].view(torch.uint8).reshape(-1)
    codes = torch.stack([halves >> 4, halves & 15], 1).reshape(-1)[: rows * columns].view(rows, columns)
    nested = "weight.nested_absmax" in tensors
    spec = Spec(_TABLES[kind], Flat(state["blocksize"]), _NESTED if nested else None, "float32", nested)
    if nested:
        _same_table(tensors["weight.nested_quant_map"], DYNAMIC_MAP.values, "scales")
        if state["nested_blocksize"] != 256:
            raise ValueError(f"scales in blocks of {state['nested_blocksize']}, expected 256")
        scales = {
            "scale_codes": tensors["weight.absmax"].view(-1, 1),
            "scale_scale": tensors["weight.nested_absmax"].view(1, -1),
            "scale_mean": torch.tensor(state["nested_offset"], dtype=torch.float32),
        }
    else:
        absmax = tensors["weight.absmax"].float()
        scales = {"scale": _lifted(absmax, codes, _TABLES[kind].values, state["blocksize"]).view(1, -1)}
    layer = LinearDescription(spec, (rows, columns))
    if prod(layer.layout()["codes"][0]) != pack(codes, 4).numel():
        raise ValueError(f"{halves.numel()} bytes of codes for {rows} x {columns} weights")
    return _with_bias(layer, {"codes": pack(codes, 4), **scales}, tensors.get("bias"))


def _lifted(absmax: Tensor, codes: Tensor, table: tuple[float, ...], size: int) -> Tensor:
    """Scales, with another than zero for blocks of zeros: it is that of no packed layer, and any stands for zeros."""
    zeros = torch.nn.functional.pad((codes == table.index(0.0)).view(-1), (0, -codes.numel() % size), value=True)
    empty = absmax == 0
    if not zeros.view(-1, size).all(1)[empty].all():
        raise ValueError("a scale of zero for numbers that are not")
    return absmax.masked_fill(empty, torch.finfo(torch.float32).smallest_normal)


def _read_8(threshold: float, name: str, tensors: Mapping[str, Tensor]) -> Layer:
    weight, scale = tensors["weight"], tensors["SCB"].float().view(-1, 1) / 127
    if tensors["weight"].dtype != torch.int8 or int(tensors.get("weight_format", torch.zeros(()))) != 0:
        raise ValueError("codes in another order than rows")
    act = ActSpec(Spec(Int(8, symmetric=True), PerToken()), threshold=threshold)
    spec = Spec(Int(8, symmetric=True), PerChannel(), scale_dtype="float32")
    layer = LinearDescription(spec, (weight.shape[0], weight.shape[1]), act=act)
    codes = (weight.to(torch.int16) + 128).to(torch.uint8)
    return _with_bias(layer, {"codes": pack(codes, 8), "scale": scale}, tensors.get("bias"))


def _with_bias(layer: LinearDescription, buffers: dict[str, Tensor], bias: Tensor | None) -> Layer:
    if bias is None:
        return layer, buffers
    return replace(layer, bias=bias.dtype), {**buffers, "bias": bias}


def _same_table(found: Tensor, expected: tuple[float, ...], what: str) -> None:
    if not torch.equal(found.float(), torch.tensor(expected)):
        raise ValueError(f"a table of {what} that is not that of bitsandbytes")


def _largest(scale: Tensor) -> Tensor:
    """``SCB``: the numbers of which a 127th is ``scale``. Raises ValueError where float32 has none."""
    near = 127 * scale
    tried = torch.stack([near, near.nextafter(near * 2), near.nextafter(near * 0)])
    right = tried / 127 == scale
    if not right.any(0).all():
        raise ValueError("a scale that is no 127th of a number of float32; store scales in float16")
    return tried.gather(0, right.int().argmax(0)[None])[0]
