"""The formats of compressed-tensors for one layer: which weights each holds, and its tensors.

    pack-quantized    weight_packed int32 [O, words], weight_scale, weight_shape; weight_zero_point int32 [words of O, G]
    int-quantized     weight int8 [O, I], weight_scale; weight_zero_point int8
    float-quantized   weight float8_e4m3fn [O, I], weight_scale
    nvfp4-pack-quantized   weight_packed uint8 [O, I / 2], weight_scale float8_e4m3fn [O, G], weight_global_scale float32 [1]
    mxfp4-pack-quantized   weight_packed uint8 [O, I / 2], weight_scale uint8 [O, G], exponents of two

Codes of integers are counted from ``-2**(bits-1)``, also in words, which hold them plus that.

Shapes: O output channel, I input channel, G group of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from lowbit.checkpoints.formats.base import integers
from lowbit.checkpoints.formats.directory import Layer
from lowbit.checkpoints.formats.integers import Integers, codes_of, size_of_groups, words
from lowbit.layouts import pack, unpack
from lowbit.modules import LinearDescription
from lowbit.numerics import Block, Float, Int, PerChannel, PerGroup, PerTensor, Spec, sizes_that_divide

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
_E4M3 = Float(4, 3, "fn")
_NVFP4 = Spec(Float(2, 1), PerGroup(16), Spec(_E4M3, PerTensor(), scale_dtype="float32"), "float32")
_MXFP4 = Spec(Float(2, 1, shared_exponent=True), PerGroup(32), scale_dtype="float8_e8m0fnu")

Buffers = dict[str, Tensor]


class WeightFormat(Protocol):
    """One format of weights.

    Attributes:
        name: as the package has it.
    """

    name: str

    def why_not(self, spec: Spec, shape: tuple[int, int]) -> str:
        """The reason why it does not hold a weight of ``shape`` in ``spec``, or ""."""
        ...

    def args(self, spec: Spec) -> dict[str, Any]:
        """The content of ``weights`` of a config group."""
        ...

    def tensors(self, layer: LinearDescription, buffers: Mapping[str, Tensor]) -> Buffers:
        """The tensors of a weight, from those of its packed layer."""
        ...

    def read(self, args: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Layer:
        """The packed layer without bias and activations, from its tensors."""
        ...


class _Codes:
    """Codes with plain scales: what is common to integers and 8-bit floats."""

    def args(self, spec: Spec) -> dict[str, Any]:
        grid = spec.grid
        whole = isinstance(grid, Int)
        args: dict[str, Any] = {
            "num_bits": grid.bits,
            "type": "int" if whole else "float",
            "symmetric": not whole or grid.symmetric,
            "dynamic": False,
        }
        return args | strategy_of(spec)


class Packed(_Codes):
    """Integers of 2 to 8 bits in words, per group or channel.

    Args:
        blocks: each group is a block of one row. The package keeps zero points of blocks in a byte each, and its way into transformers
            (0.20) reads those, but not packed ones; vLLM reads packed ones.
    """

    name = "pack-quantized"

    def __init__(self, blocks: bool = False):
        self.blocks = blocks

    def why_not(self, spec: Spec, shape: tuple[int, int]) -> str:
        if problem := integers(spec, WIDTHS):
            return problem
        if not isinstance(spec.granularity, PerGroup | PerChannel):
            return f"its weights are per group or channel, not {spec.granularity}"
        return _divides(spec, shape)

    def args(self, spec: Spec) -> dict[str, Any]:
        args = super().args(spec)
        if self._bytes(spec):
            args |= {"strategy": "block", "group_size": None, "block_structure": [1, args["group_size"]]}
        return args

    def _bytes(self, spec: Spec) -> bool:
        assert isinstance(spec.grid, Int)
        return self.blocks and not spec.grid.symmetric and isinstance(spec.granularity, PerGroup)

    def tensors(self, layer: LinearDescription, buffers: Mapping[str, Tensor]) -> Buffers:
        weight = Integers.of(layer, buffers)
        tensors = {
            "weight_packed": words(weight.codes, weight.bits),
            "weight_scale": weight.scale,
            "weight_shape": torch.tensor(layer.shape, dtype=torch.int64),
        }
        if weight.zero is not None:
            packed = words(weight.zero.T, weight.bits).T.contiguous()
            tensors["weight_zero_point"] = _counted(weight.zero, weight.bits) if self._bytes(layer.spec) else packed
        return tensors

    def read(self, args: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Layer:
        rows, columns = tensors["weight_shape"].tolist()
        bits, scale = args["num_bits"], tensors["weight_scale"]
        codes = _of_words(tensors["weight_packed"], bits, columns)
        zero = tensors.get("weight_zero_point")
        if args.get("symmetric", True):
            zero = None
        elif zero is not None and zero.dtype == torch.int32:
            zero = _of_words(zero.T, bits, rows).T
        elif zero is not None:
            zero = _uncounted(zero, bits)
        if zero is None and not args.get("symmetric", True):
            raise ValueError("no zero points, which config.json says there are")
        size = size_of_groups(_said_size(args), columns, scale.shape[1])
        return Integers(bits, size, codes, scale, zero).layer(group=tensors.get("weight_g_idx"))


class Bytes(_Codes):
    """Integers in a byte each, for layers that quantize their inputs."""

    name = "int-quantized"

    def why_not(self, spec: Spec, shape: tuple[int, int]) -> str:
        return integers(spec, WIDTHS) or _scales_problem(spec, shape)

    def tensors(self, layer: LinearDescription, buffers: Mapping[str, Tensor]) -> Buffers:
        spec, grid = layer.spec, layer.spec.grid
        assert isinstance(grid, Int)
        tensors = {
            "weight": _counted(unpack(buffers["codes"], grid.bits, layer.shape[1]), grid.bits),
            "weight_scale": _flat_of_one(buffers["scale"], spec),
        }
        if not grid.symmetric:
            zero = unpack(buffers["zero"], grid.bits, buffers["scale"].numel()).view(buffers["scale"].shape)
            tensors["weight_zero_point"] = _flat_of_one(_counted(zero, grid.bits), spec)
        return tensors

    def read(self, args: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Layer:
        bits, weight, scale = args["num_bits"], tensors["weight"], tensors["weight_scale"]
        spec, shape = _spec_of(args, Int(bits, symmetric=args.get("symmetric", True)), scale), _shape(weight)
        buffers = {"codes": pack(_uncounted(weight, bits), bits), "scale": _as_params(scale, spec, shape)}
        if not args.get("symmetric", True):
            buffers["zero"] = pack(_uncounted(tensors["weight_zero_point"], bits).reshape(-1), bits)
        return LinearDescription(spec, shape), buffers


class Floats(_Codes):
    """E4M3 in a byte each."""

    name = "float-quantized"

    def why_not(self, spec: Spec, shape: tuple[int, int]) -> str:
        if spec.grid != _E4M3 or spec.stats is not None:
            return f"its floats are E4M3 with plain scales, or NVFP4 or MXFP4; these are {spec.grid}"
        return _scales_problem(spec, shape)

    def tensors(self, layer: LinearDescription, buffers: Mapping[str, Tensor]) -> Buffers:
        return {
            "weight": buffers["codes"].view(torch.float8_e4m3fn),
            "weight_scale": _flat_of_one(buffers["scale"], layer.spec),
        }

    def read(self, args: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Layer:
        codes, scale = tensors["weight"].view(torch.uint8), tensors["weight_scale"]
        if (codes & 127 == 127).any():
            raise ValueError("weight holds NaN")
        spec, shape = _spec_of(args, _E4M3, scale), _shape(codes)
        return LinearDescription(spec, shape), {"codes": codes, "scale": _as_params(scale, spec, shape)}


class NvFp4:
    """E2M1 in blocks of 16, scales in E4M3 times a float32, of which the format keeps the reciprocal."""

    name = "nvfp4-pack-quantized"

    def why_not(self, spec: Spec, shape: tuple[int, int]) -> str:
        return "its 4-bit floats are NVFP4 or MXFP4" if spec != _NVFP4 else _divides(spec, shape)

    def args(self, spec: Spec) -> dict[str, Any]:
        return _float4("tensor_group", 16)

    def tensors(self, layer: LinearDescription, buffers: Mapping[str, Tensor]) -> Buffers:
        return {
            "weight_packed": buffers["codes"],
            "weight_scale": buffers["scale_codes"].T.contiguous().view(torch.float8_e4m3fn),
            "weight_global_scale": _reciprocal(buffers["scale_scale"].reshape(1)),
        }

    def read(self, args: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Layer:
        codes, scale = tensors["weight_packed"], tensors["weight_scale"].view(torch.uint8).T.contiguous()
        buffers = {
            "codes": codes,
            "scale_codes": scale,
            "scale_scale": 1 / tensors["weight_global_scale"].float().reshape(1, 1),
        }
        return LinearDescription(_NVFP4, (codes.shape[0], 2 * codes.shape[1])), buffers


class MxFp4:
    """E2M1 in blocks of 32 with a power of two."""

    name = "mxfp4-pack-quantized"

    def why_not(self, spec: Spec, shape: tuple[int, int]) -> str:
        return "its 4-bit floats are NVFP4 or MXFP4" if spec != _MXFP4 else _divides(spec, shape)

    def args(self, spec: Spec) -> dict[str, Any]:
        return _float4("group", 32) | {"scale_dtype": "torch.uint8"}

    def tensors(self, layer: LinearDescription, buffers: Mapping[str, Tensor]) -> Buffers:
        return {"weight_packed": buffers["codes"], "weight_scale": buffers["scale"].view(torch.uint8)}

    def read(self, args: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Layer:
        codes = tensors["weight_packed"]
        buffers = {"codes": codes, "scale": tensors["weight_scale"].view(torch.float8_e8m0fnu)}
        return LinearDescription(_MXFP4, (codes.shape[0], 2 * codes.shape[1])), buffers


# Strategies: the elements that share a scale


def strategy_of(spec: Spec) -> dict[str, Any]:
    """The keys of a granularity; :func:`_scales_problem` is "" for it."""
    match spec.granularity:
        case PerGroup(size):
            return {"strategy": "group", "group_size": size}
        case Block(rows, columns):
            return {"strategy": "block", "group_size": None, "block_structure": [rows, columns]}
        case PerTensor():
            return {"strategy": "tensor", "group_size": None}
    return {"strategy": "channel", "group_size": None}


def _spec_of(args: Mapping[str, Any], grid: Int | Float, scale: Tensor) -> Spec:
    dtype = str(scale.dtype).removeprefix("torch.")
    match args.get("strategy"):
        case "group":
            return Spec(grid, PerGroup(args["group_size"]), scale_dtype=dtype)
        case "block":
            return Spec(grid, Block(*args["block_structure"]), scale_dtype=dtype)
        case "tensor":
            return Spec(grid, PerTensor(), scale_dtype=dtype)
        case "channel":
            return Spec(grid, PerChannel(), scale_dtype=dtype)
    raise ValueError(f"scales by {args.get('strategy')!r}, expected tensor, channel, group or block")


def _scales_problem(spec: Spec, shape: tuple[int, int]) -> str:
    if not isinstance(spec.granularity, PerGroup | PerChannel | PerTensor | Block):
        return f"its scales are per tensor, channel, group or block, not {spec.granularity}"
    return _divides(spec, shape)


def _divides(spec: Spec, shape: tuple[int, int]) -> str:
    if isinstance(spec.granularity, PerGroup) and shape[1] % spec.granularity.size:
        return (
            f"its groups divide a row; {spec.granularity.size} does not divide {shape[1]}: use a group_size of "
            f"{sizes_that_divide(shape[1])}"
        )
    return ""


def _said_size(args: Mapping[str, Any]) -> int | None:
    block = args.get("block_structure")
    return block[1] if block else args.get("group_size")


def _float4(strategy: str, size: int) -> dict[str, Any]:
    return {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": strategy,
        "group_size": size,
        "dynamic": False,
    }


# Tensors


def _shape(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]


def _counted(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes as int8 around zero."""
    return (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


def _uncounted(values: Tensor, bits: int) -> Tensor:
    codes = values.to(torch.int16) + 2 ** (bits - 1)
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 2**bits:
        raise ValueError(f"numbers from {int(values.min())} to {int(values.max())}, which {bits} bits do not hold")
    return codes.to(torch.uint8)


def _of_words(packed: Tensor, bits: int, count: int) -> Tensor:
    """Codes of rows of words. Older versions of the package put whole codes of 3, 5, 6 and 7 bits into each word."""
    if packed.shape[1] == -(-count * bits // 32):
        return codes_of(packed, bits, count)
    each = 32 // bits
    if packed.shape[1] != -(-count // each):
        raise ValueError(f"{packed.shape[1]} words for {count} codes of {bits} bits")
    parts = [(packed.long() >> bits * i) & 2**bits - 1 for i in range(each)]
    return torch.stack(parts, 2).flatten(1)[:, :count].to(torch.uint8)


def _flat_of_one(value: Tensor, spec: Spec) -> Tensor:
    """``[1]`` for a number that is shared by the whole tensor, as the package has it."""
    return value.reshape(1) if isinstance(spec.granularity, PerTensor) else value


def _as_params(scale: Tensor, spec: Spec, shape: tuple[int, int]) -> Tensor:
    return scale.reshape(spec.granularity.param_shape(shape))


def _reciprocal(scale: Tensor) -> Tensor:
    """The number whose reciprocal is ``scale``, or the nearest where float32 has none."""
    near = 1 / scale
    tried = (near, near.nextafter(near * 2), near.nextafter(near * 0))
    return next((each for each in tried if torch.equal(1 / each, scale)), near)


FORMATS: dict[str, WeightFormat] = {each.name: each for each in (Packed(), Bytes(), Floats(), NvFp4(), MxFp4())}
