"""The format of AWQ, version GEMM: eight columns of the transposed weight in a word, in an order that its kernels unpack fast.

A layer has ``qweight`` int32 ``[I, O / 8]``, ``qzeros`` int32 ``[G, O / 8]`` and ``scales`` float16 ``[G, O]``. Nibble i of a word
holds column ``_ORDER[i]`` of its eight.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoints.description import ModelDescription
from lowbit.checkpoints.formats.base import WithProblems, beside_codes, biases, group_size, integers, shapes
from lowbit.checkpoints.formats.directory import Layer, in_blocks, quantization_of, read_directory, write_directory
from lowbit.checkpoints.formats.integers import Integers, codes_of, size_of_groups, words
from lowbit.checkpoints.packed_model import PackedLayer, PackedModel
from lowbit.modules import ActSpec
from lowbit.numerics import PerGroup, Spec, sizes_that_divide

_BITS = 4
_ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
_BUFFERS = ("qweight", "qzeros", "scales")


class Awq(WithProblems):
    """Integers of 4 bits by groups, one format for all layers; weights only."""

    name = "awq"
    title = "AWQ format (GEMM)"

    def problems(self, description: ModelDescription, new_biases: Collection[str]) -> Iterator[str]:
        yield from biases(new_biases)
        yield from beside_codes(description)
        if description.unfused_experts:
            yield "experts are not written"
        distinct = shapes(description)
        for shape in distinct:
            if problem := _problem(*shape):
                yield problem
        if len({spec for spec, *_ in distinct}) > 1:
            yield "it has one format for all layers, the model several (--head-bits 16 leaves the head as it is)"

    def write(self, model: PackedModel, directory: Path) -> None:
        size = next(iter(model.description.layers.values())).spec.granularity
        config = {
            "quant_method": "awq",
            "bits": _BITS,
            "group_size": size.size if isinstance(size, PerGroup) else -1,
            "zero_point": True,
            "version": "gemm",
        }

        def said(plain: list[str]) -> dict[str, Any]:
            return config | {"modules_to_not_convert": ["lm_head", *in_blocks(plain, model.description)]}

        write_directory(model, directory, said, _tensors)

    def read(self, directory: Path) -> PackedModel:
        config = quantization_of(directory, "awq")
        bits = config.get("bits")
        version = config.get("version") or config.get("checkpoint_format") or config.get("format") or "gemm"
        if bits != _BITS or str(version).lower() != "gemm":
            raise self.unreadable(directory, f"has {bits!r} bits, version {version!r}")
        return read_directory(directory, "qweight", _BUFFERS, partial(_layer, config))


def _problem(spec: Spec, act: ActSpec | None, shape: tuple[int, int]) -> str:
    problem = integers(spec, (_BITS,))
    if problem or act is not None:
        return problem or "it is for weights only: quantized activations have no place in it"
    size = group_size(spec, shape[1])
    if size is None or shape[1] % size:
        return (
            f"its groups divide a row; these weights ({shape[1]} inputs) are {spec.granularity}: use a group_size of "
            f"{sizes_that_divide(shape[1])}"
        )
    if spec.scale_dtype != "float16":
        return f"its scales are float16, these are {spec.scale_dtype}"
    return f"its rows are multiples of 8, found {shape[0]}" if shape[0] % 8 else ""


def _mixed(codes: Tensor) -> Tensor:
    """``[n, O]``, every eight columns in the order of the format."""
    return codes.unflatten(1, (-1, 8))[..., _ORDER].flatten(1)


def _unmixed(codes: Tensor) -> Tensor:
    return codes.unflatten(1, (-1, 8))[..., _ORDER.argsort()].flatten(1)


def _tensors(part: PackedLayer) -> dict[str, Tensor]:
    weight = Integers.of(part.description, part.tensors)
    tensors = {
        "qweight": words(_mixed(weight.codes.T), _BITS),
        "qzeros": words(_mixed(weight.zeros.T), _BITS),
        "scales": weight.scale.T.contiguous(),
    }
    return tensors | ({"bias": part.tensors["bias"]} if part.description.bias is not None else {})


def _layer(config: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor]) -> Layer:
    scales = tensors["scales"].T
    rows, groups = scales.shape
    codes = _unmixed(codes_of(tensors["qweight"], _BITS, rows)).T
    zero = _unmixed(codes_of(tensors["qzeros"], _BITS, rows)).T
    symmetric = bool((zero == 2 ** (_BITS - 1)).all())
    size = size_of_groups(config.get("group_size"), codes.shape[1], groups)
    return Integers(_BITS, size, codes, scales, None if symmetric else zero).layer(tensors.get("bias"))
