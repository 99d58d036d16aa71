"""The format of GPTQ: words down the rows of the transposed weight, as GPTQModel, vLLM and transformers read it.

A layer has ``qweight`` int32 ``[words of I, O]``, ``qzeros`` int32 ``[G, words of O]``, ``scales`` float16 ``[G, O]`` and
``g_idx`` int32 ``[I]``, the group of each input, which makes room for groups in an order of their own. Version 1 stores zero
points less one and its readers add it word by word, so a zero point of zero would change its neighbour: models with zero points
are written in version 2, which stores them as they are.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoints.description import ModelDescription
from lowbit.checkpoints.formats.base import WithProblems, beside_codes, biases, group_size, integers, shapes
from lowbit.checkpoints.formats.directory import Layer, in_blocks, quantization_of, read_directory, write_directory
from lowbit.checkpoints.formats.integers import Integers, codes_of, size_of_groups, words
from lowbit.checkpoints.native.writing import write_json
from lowbit.checkpoints.packed_model import PackedLayer, PackedModel
from lowbit.modules import ActSpec
from lowbit.numerics import Int, PerGroup, Spec, sizes_that_divide
from lowbit.version import __version__

_BUFFERS = ("qweight", "qzeros", "scales", "g_idx")
_ORDER = "pre0_index"
_FORMATS = {1: "gptq", 2: "gptq_v2"}
_BITS = (2, 3, 4, 8)


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
        config: dict[str, Any] = {
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

        def said(plain: list[str]) -> dict[str, Any]:
            dynamic = {f"-:^{re.escape(name)}$": {} for name in in_blocks(plain, model.description)}
            return config | ({"dynamic": dynamic} if dynamic else {})

        written = write_directory(model, directory, said, partial(_tensors, version))
        write_json(directory / "quantize_config.json", written)

    def read(self, directory: Path) -> PackedModel:
        config = quantization_of(directory, "gptq")
        bits, kind = config.get("bits"), config.get("checkpoint_format") or config.get("format") or "gptq"
        words_of = str(config.get("pack_dtype") or "int32").removeprefix("torch.")
        version = next((number for number, name in _FORMATS.items() if name == kind), None)
        if bits not in _BITS or version is None or words_of != "int32":
            raise self.unreadable(directory, f"has {bits!r} bits in format {kind!r} in words of {words_of}")
        return read_directory(directory, "qweight", _BUFFERS, partial(_layer, version, config))


def _problem(spec: Spec, act: ActSpec | None, shape: tuple[int, int]) -> str:
    problem = integers(spec, _BITS)
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


def _layer(version: int, config: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor]) -> Layer:
    scales, group = tensors["scales"].T, tensors.get("g_idx")
    rows, groups = scales.shape
    packed = tensors["qweight"].shape[0] * 32
    # Layers may have bits of their own ("dynamic"): the words of a column say how many.
    columns = packed // config["bits"] if group is None else len(group)
    bits = packed // columns
    if bits not in _BITS or packed != bits * columns:
        raise ValueError(f"{packed} bits of codes for {columns} inputs")
    codes = codes_of(tensors["qweight"].T, bits, columns)
    zero = _zeros(tensors["qzeros"], bits, rows, version, config)
    if config.get("sym") and (zero == 2 ** (bits - 1)).all():
        zero = None
    size = size_of_groups(config.get("group_size"), columns, groups)
    return Integers(bits, size, codes, scales, zero).layer(tensors.get("bias"), group)


def _zeros(packed: Tensor, bits: int, rows: int, version: int, config: Mapping[str, Any]) -> Tensor:
    """Zero points, uint8 ``[O, G]``."""
    stored = codes_of(packed, bits, rows).T
    if version == 2:
        return stored
    if (stored < 2**bits - 1).all():
        return stored + 1
    # The tools of version 1 disagree about a zero point of zero. GPTQModel's adds to whole words, so a carry goes to the next field;
    # it wrote the file by the inverse. Zero points of 3 bits cross words, and it adds to each of them alone.
    makers = (config.get("meta") or {}).get("quantizer") or ()
    if not any(
        str(maker).lower().startswith("gptqmodel") for maker in ([makers] if isinstance(makers, str) else makers)
    ):
        raise ValueError(
            "a zero point of zero, which tools of version 1 store in different ways, and config.json does not say that GPTQModel "
            "made it; convert the model to gptq_v2 with the tool that did"
        )
    if bits == 3:
        return (stored + 1) % 2**bits
    ones = torch.full((), sum(1 << at for at in range(0, 32, bits)), dtype=torch.int64)
    return codes_of((packed.long() + ones).to(torch.int32), bits, rows).T
