"""compressed-tensors, the format of vLLM and llm-compressor, as its package 0.20 reads it.

config.json has groups of layers, each with the formats of weights and inputs. The layouts of weights are those of
:mod:`~lowbit.checkpoints.formats.compressed_weights`. A layer with a static range of its input has ``input_scale`` [1], and
``input_zero_point`` int8 [1] where that range is not symmetric.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from lowbit.checkpoints.description import ModelDescription
from lowbit.checkpoints.formats.base import WithProblems, beside_codes, biases, shapes
from lowbit.checkpoints.formats.compressed_cache import NOTE, is_known, scheme, why_no_cache, with_ranges, with_scales
from lowbit.checkpoints.formats.compressed_weights import FORMATS, Bytes, Packed, WeightFormat
from lowbit.checkpoints.formats.directory import Layer, quantization_of, read_directory, write_directory
from lowbit.checkpoints.packed_model import PackedLayer, PackedModel
from lowbit.checkpoints.shards import ModelError, read_headers, read_tensor
from lowbit.modules import ActSpec
from lowbit.numerics import Float, Int, PerGroup, PerTensor, PerToken, Spec

_METHOD, _MIXED = "compressed-tensors", "mixed-precision"
_BUFFERS = (
    "weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale", "weight_g_idx",
    "input_scale", "input_zero_point",
)  # fmt: skip
_OF_ATTENTION = re.compile(r"\.(q|k|v)_(scale|zero_point)$")
_FLOATS = {8: Float(4, 3, "fn")}


@dataclass(frozen=True)
class CompressedTensors(WithProblems):
    """Integers and floats, several formats in a model, quantized inputs.

    Args:
        blocks: zero points of groups are written so that transformers loads them by default, see :class:`Packed`.
    """

    blocks: bool = False
    name = "compressed-tensors"
    title = "vLLM / compressed-tensors"

    def with_option(self, option: str) -> CompressedTensors:
        """``compressed-tensors:transformers``."""
        if option != "transformers":
            raise ValueError(f"compressed-tensors:{option}: expected compressed-tensors:transformers")
        return CompressedTensors(blocks=True)

    def problems(self, description: ModelDescription, new_biases: Collection[str]) -> Iterator[str]:
        yield from biases(new_biases)
        yield from beside_codes(description, cache=True)
        if problem := why_no_cache(description):
            yield problem
        if description.unfused_experts:
            yield "experts are not written"
        for spec, act, shape in shapes(description):
            if problem := _format(spec, act).why_not(spec, shape) or _act_problem(spec, act):
                yield problem

    def note(self, description: ModelDescription) -> str | None:
        notes = [self._zero_points(description), NOTE if description.cache else None]
        return " ".join(note for note in notes if note) or None

    def _zero_points(self, description: ModelDescription) -> str | None:
        asymmetric = any(
            isinstance(s.grid, Int) and not s.grid.symmetric and a is None for s, a, _ in shapes(description)
        )
        if not asymmetric:
            return None
        if self.blocks:
            return "the zero points are unpacked, which transformers loads and vLLM does not; without :transformers it does"
        return (
            "vLLM loads its packed zero points; transformers with compressed-tensors 0.20 only with quantization_config="
            "CompressedTensorsConfig(dequantize=True). compressed-tensors:transformers, and symmetric=true, load without"
        )

    def write(self, model: PackedModel, directory: Path) -> None:
        groups: dict[tuple[Spec, ActSpec | None], list[str]] = {}
        for name, layer in model.description.layers.items():
            groups.setdefault((layer.spec, layer.act), []).append(name)
        found = {f"group_{i}": self._group(*each, names) for i, (each, names) in enumerate(groups.items())}
        kinds = {group["format"] for group in found.values()}
        config = {
            "quant_method": _METHOD,
            "format": kinds.pop() if len(kinds) == 1 else _MIXED,
            "quantization_status": "compressed",
            "config_groups": found,
            "ignore": [],
            "kv_cache_scheme": scheme(model.description),
            "global_compression_ratio": None,
        }
        write_directory(with_scales(model), directory, lambda plain: config, self._tensors)

    def _group(self, spec: Spec, act: ActSpec | None, names: list[str]) -> dict[str, Any]:
        kind = _format(spec, act, self.blocks)
        return {
            "targets": names,
            "weights": kind.args(spec),
            "input_activations": None if act is None else _act_args(act),
            "output_activations": None,
            "format": kind.name,
        }

    def _tensors(self, part: PackedLayer) -> dict[str, Tensor]:
        layer = part.description
        tensors = _format(layer.spec, layer.act, self.blocks).tensors(layer, part.tensors)
        if layer.act is not None and layer.act.static:
            tensors["input_scale"] = part.tensors["act_scale"].reshape(1)
            if "act_zero" in part.tensors:
                middle = 2 ** (layer.act.spec.grid.bits - 1)
                tensors["input_zero_point"] = (part.tensors["act_zero"] - middle).reshape(1).to(torch.int8)
        return tensors | ({"bias": part.tensors["bias"]} if layer.bias is not None else {})

    def read(self, directory: Path) -> PackedModel:
        config = quantization_of(directory, _METHOD)
        groups = [_Group.of(group, config.get("format")) for group in (config.get("config_groups") or {}).values()]
        unknown = [group.format for group in groups if group.format not in FORMATS]
        if unknown or not groups or config.get("sparsity_config") or config.get("transform_config"):
            raise self.unreadable(directory, f"has format {', '.join(map(str, unknown))}, sparse weights or transforms")
        try:
            for group in groups:
                group.act_spec()
        except ValueError as error:
            raise self.unreadable(directory, f"quantizes inputs {error}") from error
        model = read_directory(directory, "weight_scale", _BUFFERS, partial(_layer, groups), _OF_ATTENTION)
        cache = config.get("kv_cache_scheme")
        if cache and not is_known(cache):
            warnings.warn(
                f"{directory}: the cache is quantized in this model ({cache}) and is not here; --kv chooses one",
                stacklevel=2,
            )
        return self._with_cache(model, directory) if cache and is_known(cache) else model

    def _with_cache(self, model: PackedModel, directory: Path) -> PackedModel:
        headers = {name: h for name, h in read_headers(directory).items() if name.endswith((".k_scale", ".v_scale"))}
        try:
            scales = {name: read_tensor(header) for name, header in headers.items()}
            return with_ranges(model, scales, AutoConfig.for_model(**model.config))
        except ValueError as error:
            raise ModelError(f"{directory}: {error}") from error


@dataclass(frozen=True)
class _Group:
    """One of a config's groups of layers."""

    targets: tuple[str, ...]
    format: str
    weights: Mapping[str, Any]
    inputs: Mapping[str, Any] | None

    @staticmethod
    def of(group: Mapping[str, Any], format: str | None) -> _Group:
        kind = group.get("format") or format
        return _Group(tuple(group["targets"]), str(kind), group["weights"] or {}, group.get("input_activations"))

    def place(self, name: str) -> int | None:
        """How narrowly it names a layer: 0 by its name, 1 by a pattern, 2 by its class; None: not at all."""
        found = [
            0 if target == name else 1 if target.startswith("re:") else 2
            for target in self.targets
            if target == name or target == "Linear" or (target.startswith("re:") and re.match(target[3:], name))
        ]
        return min(found, default=None)

    def act_spec(self) -> ActSpec | None:
        """How it quantizes inputs. Raises ValueError, with the words behind "quantizes inputs", for ways that are not known here."""
        args = self.inputs
        if args is None:
            return None
        bits, strategy, dynamic = args.get("num_bits", 8), args.get("strategy"), args.get("dynamic", False)
        grains = {"tensor": PerTensor(), "token": PerToken(), "group": PerGroup(args.get("group_size") or 1)}
        if args.get("type", "int") == "int":
            grid = Int(bits, symmetric=args.get("symmetric", True))
        elif bits in _FLOATS:
            grid = _FLOATS[bits]
        else:
            raise ValueError(f"as floats of {bits} bits")
        if strategy not in grains or dynamic not in (True, False):
            raise ValueError(f"by {strategy}, dynamic {dynamic}")
        return ActSpec(Spec(grid, grains[strategy], scale_dtype="float32"), static=not dynamic)


def _layer(groups: list[_Group], name: str, tensors: Mapping[str, Tensor]) -> Layer:
    placed = [(group.place(name), i) for i, group in enumerate(groups)]
    found = min(((place, i) for place, i in placed if place is not None), default=None)
    if found is None:
        raise ValueError("no group of config.json targets it")
    group = groups[found[1]]
    description, buffers = FORMATS[group.format].read(group.weights, tensors)
    act, bias = group.act_spec(), tensors.get("bias")
    if act is not None and act.static:
        buffers["act_scale"] = tensors["input_scale"].float().reshape(1, 1)
        if isinstance(act.spec.grid, Int) and not act.spec.grid.symmetric:
            zero = tensors["input_zero_point"].float().reshape(1, 1)
            buffers["act_zero"] = zero + 2 ** (act.spec.grid.bits - 1)
    if bias is not None:
        buffers["bias"] = bias
    return replace(description, act=act, bias=None if bias is None else bias.dtype), buffers


def _format(spec: Spec, act: ActSpec | None, blocks: bool = False) -> WeightFormat:
    """The format for weights in ``spec``, or the one that says why there is none."""
    if not isinstance(spec.grid, Float):
        return Bytes() if act is not None and spec.grid.bits == 8 else Packed(blocks)
    name = "float-quantized" if spec.grid.bits == 8 else "mxfp4-pack-quantized" if spec.grid.shared_exponent else ""
    return FORMATS[name or "nvfp4-pack-quantized"]


def _act_problem(spec: Spec, act: ActSpec | None) -> str:
    if act is None:
        return ""
    grid = act.spec.grid
    plain = isinstance(grid, Int) and grid.bits in (4, 8) and not grid.real_zero and not grid.full and grid.reach == 1
    if isinstance(spec.grid, Float) and (spec.grid.bits < 8 or not isinstance(grid, Float)):
        return "inputs of layers with weights in 8-bit floats are E4M3, and those of 4-bit floats are not quantized"
    if not plain and grid not in _FLOATS.values():
        return f"its inputs are integers of 4 or 8 bits or E4M3, not {grid}"
    if (
        act.threshold
        or act.spec.stats is not None
        or not isinstance(act.spec.granularity, PerToken | PerTensor | PerGroup)
    ):
        return f"its inputs are quantized whole, per token, tensor or group, not {act.spec.granularity} with outliers apart"
    return ""


def _act_args(act: ActSpec) -> dict[str, Any]:
    grid, grain = act.spec.grid, act.spec.granularity
    strategy = {PerToken: "token", PerTensor: "tensor", PerGroup: "group"}[type(grain)]
    return {
        "num_bits": grid.bits,
        "type": "int" if isinstance(grid, Int) else "float",
        "symmetric": not isinstance(grid, Int) or grid.symmetric,
        "strategy": strategy,
        "group_size": grain.size if isinstance(grain, PerGroup) else None,
        "dynamic": not act.static,
    }
