"""Weights that are stored as 8-bit floats or 4-bit codes with scales, read as the weights that they stand for.

    NAME (float8) and NAME_scale_inv:       NAME * scale, one for the tensor or for each block of it (FP8, as DeepSeek-V3)
    NAME (float8) alone:                    NAME, a plain cast
    NAME_blocks and NAME_scales (uint8):    32 codes of FP4 (e2m1) and a power of two (MXFP4, as gpt-oss)

A `ScaledWeight` has the dtype and shape that the model expects and can be read like any stored tensor, whole or by rows of
its leading axis. The rest of the package never sees codes without their scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoints.shards import ModelError, TensorHeader, read_tensor

READABLE = ("fp8", "mxfp4")
"""The ``quant_method``s whose weights are read."""
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_BLOCK = (128, 128)  # of a scale where no quantization_config says it
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class ScaledWeight:
    """A weight in two stored tensors: ``codes`` and ``scales``.

    ``scales``: None: 8-bit floats that are the weight itself. ``block``: (rows, columns) that share a scale of an 8-bit float;
    None: there are no scales, or the tensor is MXFP4.
    """

    codes: TensorHeader
    scales: TensorHeader | None
    dtype: torch.dtype
    shape: tuple[int, ...]
    block: tuple[int, int] | None

    @property
    def file(self) -> Any:
        return self.codes.file

    @property
    def nbytes(self) -> int:
        """Bytes of the weight as it is read."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def read(self, rows: tuple[int, int] | None = None) -> Tensor:
        """The weight, or rows [first, last) of its leading axis."""
        if self.scales is None:
            return read_tensor(self.codes, rows).to(self.dtype)
        if self.block is None:
            return _from_mxfp4(read_tensor(self.codes, rows), read_tensor(self.scales, rows), self.dtype)
        first, last = rows or (0, self.shape[0])
        codes, scales = read_tensor(self.codes, rows), read_tensor(self.scales)
        return (codes.float() * _spread(scales.float(), self.shape, self.block, first, last)).to(self.dtype)


def holds_scaled(headers: Mapping[str, TensorHeader]) -> bool:
    """Whether some weights are stored in 8-bit floats or as MXFP4."""
    return any(
        header.dtype in _FLOAT8 or (key.endswith("_blocks") and f"{key.removesuffix('_blocks')}_scales" in headers)
        for key, header in headers.items()
    )


def with_scales(
    name: str, headers: Mapping[str, TensorHeader], quantization: Mapping[str, Any] | None, dtype: torch.dtype
) -> tuple[dict[str, TensorHeader | ScaledWeight], frozenset[str]]:
    """A checkpoint's tensors with scaled weights in place of their codes, and the names of the stored tensors these are
    made of.

    Args:
        name: of the model, for errors.
        quantization: the config's ``quantization_config``, or None.
        dtype: of the weights that are made.

    Raises:
        ModelError: scales whose meaning is not known.
    """
    made: dict[str, TensorHeader | ScaledWeight] = dict(headers)
    parts: set[str] = set()
    block = (quantization or {}).get("weight_block_size")
    for key, header in headers.items():
        stem = key.removesuffix("_blocks")
        if stem != key and header.dtype == torch.uint8 and f"{stem}_scales" in headers:
            made |= {stem: _mxfp4(key, header, headers[f"{stem}_scales"], dtype)}
            used = {key, f"{stem}_scales"}
        elif header.dtype in _FLOAT8:
            weight = _float8(name, key, headers, quantization is not None, block, dtype)
            made |= {key: weight}
            used = set() if weight.scales is None else {f"{key}_scale_inv"}
        else:
            continue
        parts |= used | {key}
        for old in used:
            made.pop(old, None)
    return made, frozenset(parts)


def _float8(
    name: str, key: str, headers: Mapping[str, TensorHeader], described: bool, block: Any, dtype: torch.dtype
) -> ScaledWeight:
    header, scale = headers[key], f"{key}_scale_inv"
    if scale not in headers:
        near = [other for other in headers if other != key and other.startswith(key.rpartition(".")[0] + ".")]
        near = [other for other in near if "scale" in other.rpartition(".")[2]]
        # Scales of other weights say that this one's were lost: it is no plain cast.
        near = near or [other for other in headers if other.endswith(("weight_scale_inv", "weight_scale"))]
        if near or described:
            raise ModelError(
                f"{name}: {key} is stored as {header.dtype} with {near[0] if near else 'no scale'}, and what that means is "
                f"not known. Expected {scale}, by which the weight is multiplied. Convert the checkpoint to bfloat16 first."
            )
        # Not kept as it is: what is folded into a tensor would be rounded to the few digits of its type.
        return ScaledWeight(header, None, dtype, header.shape, None)
    shape, scales = header.shape, headers[scale].shape
    chosen: tuple[int, int] | None = None
    if torch.Size(scales).numel() == 1:
        chosen = _BLOCK  # of any size: there is one
    elif len(shape) == len(scales) and len(shape) >= 2:
        rows, columns = block or _BLOCK
        expected = (*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns))
        chosen = (int(rows), int(columns)) if scales == expected else None
    if chosen is None or not headers[scale].dtype.is_floating_point:
        raise ModelError(
            f"{name}: {key} has shape {list(shape)} and its scales {scale} have {list(scales)}; expected one scale, or one for "
            f"each block of {list(block or _BLOCK)}. Convert the checkpoint to bfloat16 first."
        )
    return ScaledWeight(header, headers[scale], dtype, shape, chosen)


def _spread(scales: Tensor, shape: tuple[int, ...], block: tuple[int, int], first: int, last: int) -> Tensor:
    """The scale of every weight of rows [first, last) of the leading axis."""
    if scales.numel() == 1:
        return scales.reshape(())
    if len(shape) > 2:
        scales = scales[first:last]
        first, last = 0, shape[-2]
    spread = scales.repeat_interleave(block[0], -2)[..., first:last, :]
    return spread.repeat_interleave(block[1], -1)[..., : shape[len(shape) - 1]]


def _mxfp4(key: str, codes: TensorHeader, scales: TensorHeader, dtype: torch.dtype) -> ScaledWeight:
    """[E, O, G, 16] bytes of two codes each and [E, O, G] exponents: the weight [E, 32 G, O], as the model multiplies it."""
    if len(codes.shape) != 4 or codes.shape[3] != 16 or scales.shape != codes.shape[:3] or scales.dtype != torch.uint8:
        raise ModelError(
            f"{key}: shape {list(codes.shape)} with scales {scales.dtype} {list(scales.shape)}; expected MXFP4: uint8 "
            "[experts, out, groups, 16] and uint8 [experts, out, groups]."
        )
    experts, out, groups, _ = codes.shape
    return ScaledWeight(codes, scales, dtype, (experts, 32 * groups, out), None)


def _from_mxfp4(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    table = torch.tensor((*_FP4, *(-value for value in _FP4)), dtype=torch.float32)
    values = table[torch.stack((codes & 15, codes >> 4), -1).flatten(-2).long()]  # the low half of a byte comes first
    return torch.ldexp(values, scales[..., None].int() - 127).flatten(-2).transpose(1, 2).contiguous().to(dtype)
