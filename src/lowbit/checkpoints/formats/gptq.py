"""The format of GPTQ: words down the rows of the transposed weight, as GPTQModel, vLLM and transformers read it.

A layer has ``qweight`` int32 ``[words of I, O]``, ``qzeros`` int32 ``[G, words of O]``, ``scales`` float16 ``[G, O]`` and
``g_idx`` int32 ``[I]``, the group of each input, which makes room for groups in an order of their own. Version 1 stores zero
points less one and its readers add it word by word, so a zero point of zero would change its neighbour: models with zero points
are written in version 2, which stores them as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lowbit.checkpoints.description import ModelDescription
from lowbit.checkpoints.formats.base import WithProblems, beside_codes, biases, group_size, integers, shapes
from lowbit.checkpoints.formats.directory import Layer, quantization_of, read_directory, write_directory
from lowbit.checkpoints.formats.integers import Integers, codes_of, words
from lowbit.checkpoints.native.writing import write_json
from lowbit.checkpoints.packed_model import PackedLayer, PackedModel
from lowbit.modules import ActSpec, LinearDescription, serialize_transforms
from lowbit.numerics import Int, PerGroup, Spec
from lowbit.transforms import Permute
from lowbit.version import __version__

_BUFFERS = ("qweight", "qzeros", "scales", "g_idx")
_ORDER = "pre0_index"
_FORMATS = {1: "gptq", 2: "gptq_v2"}


@dataclass(frozen=True)
class Gptq(WithProblems):
    """One format of integers for all layers, by groups in any column order; weights only.

    Args:
        version: of zero points; None: 1 where there are none, else 2.
    """

    version: int | None = None
    name = "gptq"
    title = "GPTQ format"

    def with_option(self, option: str) -> Gptq:
        """``gptq:v1`` or ``gptq:v2``."""
        if option not in ("v1", "v2"):
            raise ValueError(f"gptq:{option}: expected gptq:v1 or gptq:v2")
        return Gptq(int(option[1]))

    def problems(self, description: ModelDescription, new_biases: Collection[str]) -> Iterator[str]:
        yield from biases(new_biases)
        yield from beside_codes(description, order=True)
        if description.unfused_experts:
            yield "experts are not written"
        distinct = shapes(description)
        for shape in distinct:
            if problem := _problem(*shape):
                yield problem
        specs = {spec for spec, *_ in distinct}
        if len(specs) > 1:
            yield "it has one format for all layers, the model several (--head-bits 16 leaves the head as it is)"
        if self.version == 1 and any(isinstance(spec.grid, Int) and not spec.grid.symmetric for spec in specs):
            yield "its version 1 does not hold every zero point; gptq:v2 does, and symmetric=true needs none"

    def write(self, model: PackedModel, directory: Path) -> None:
        first = next(iter(model.description.layers.values()))
        grid, size = first.spec.grid, first.spec.granularity
        assert isinstance(grid, Int)
        version = self.version or (1 if grid.symmetric else 2)
        config = {
            "quant_method": "gptq",
            "bits": grid.bits,
            "group_size": size.size if isinstance(size, PerGroup) else -1,
            "desc_act": any(layer.pre for layer in model.description.layers.values()),
            "sym": grid.symmetric,
            "true_sequential": False,
            "lm_head": False,
            "pack_dtype": "int32",
            "checkpoint_format": _FORMATS[version],
            "meta": {"quantizer": [f"lowbit:{__version__}"]},
        }
        write_directory(model, directory, config, partial(_tensors, version))
        write_json(directory / "quantize_config.json", config)

    def read(self, directory: Path) -> PackedModel:
        config = quantization_of(directory, "gptq")
        bits, kind = config.get("bits"), config.get("checkpoint_format", "gptq")
        version = next((number for number, name in _FORMATS.items() if name == kind), None)
        if bits not in (2, 3, 4, 8) or version is None or config.get("dynamic"):
            raise self.unreadable(directory, f"has {bits!r} bits in format {kind!r}, or several formats")
        return read_directory(directory, "qweight", _BUFFERS, partial(_layer, version, bits, bool(config.get("sym"))))


def _problem(spec: Spec, act: ActSpec | None, shape: tuple[int, int]) -> str:
    problem = integers(spec, (2, 3, 4, 8))
    if problem or act is not None:
        return problem or "it is for weights only: quantized activations have no place in it"
    size = group_size(spec, shape[1])
    if size is None or shape[1] % size:
        return f"its groups divide a row; these weights ({shape[1]} inputs) are {spec.granularity}"
    if spec.scale_dtype != "float16":
        return f"its scales are float16, these are {spec.scale_dtype}"
    if shape[0] % 32 or shape[1] % 32:
        return f"its rows and columns are multiples of 32, found {shape[0]} x {shape[1]}"
    return ""


def _tensors(version: int, part: PackedLayer) -> dict[str, Tensor]:
    weight = Integers.of(part.description, part.tensors)
    group = torch.arange(weight.codes.shape[1], dtype=torch.int32) // weight.size
    codes = weight.codes
    if part.description.pre:  # stored column j reads input index[j]
        index = part.tensors[_ORDER].long()
        back = index.argsort()
        codes, group = codes[:, back], group[back]
    zeros = weight.zeros - int(version == 1)
    tensors = {
        "qweight": words(codes, weight.bits).T.contiguous(),
        "qzeros": words(zeros.T, weight.bits),
        "scales": weight.scale.T.contiguous(),
        "g_idx": group,
    }
    return tensors | ({"bias": part.tensors["bias"]} if part.description.bias is not None else {})


def _layer(version: int, bits: int, symmetric: bool, name: str, tensors: Mapping[str, Tensor]) -> Layer:
    scales = tensors["scales"].T
    rows, groups = scales.shape
    columns = tensors["qweight"].shape[0] * 32 // bits
    codes = codes_of(tensors["qweight"].T, bits, columns)
    zero = codes_of(tensors["qzeros"], bits, rows).T.int() + int(version == 1)
    if (zero >= 2**bits).any():
        raise ValueError("a zero point beyond the codes, which readers of version 1 understand differently")
    zero = zero.to(torch.uint8)
    if symmetric and (zero == 2 ** (bits - 1)).all():
        zero = None
    size, group = columns // groups, tensors.get("g_idx")
    bias = tensors.get("bias")
    if group is None or torch.equal(group.long(), torch.arange(columns) // size):
        return Integers(bits, size, codes, scales, zero).layer(bias)
    index = group.argsort(stable=True)
    if not torch.equal(group[index].long(), torch.arange(columns) // size):
        raise ValueError("groups of unequal size")
    description, found = Integers(bits, size, codes[:, index], scales, zero).layer(bias)
    order = Permute(index)
    return _with_order(description, order), found | serialize_transforms.tensors("pre", (order,))


def _with_order(description: LinearDescription, order: Permute) -> LinearDescription:
    return LinearDescription(
        description.spec, description.shape, description.bias, pre=serialize_transforms.describe("pre", (order,))
    )
