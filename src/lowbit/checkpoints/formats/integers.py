"""Integers with scales and zero points as several formats have them: codes in 32-bit words, tensors of a layer under other names.

Their words are dense streams, the lowest bits first, like the bytes of the canonical layout: a row of codes, filled up to whole
words, is the same bits.

Shapes: O output channel, I input channel, G group of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.checkpoints.formats.base import group_size
from lowbit.layouts import pack, unpack
from lowbit.modules import LinearDescription, serialize_transforms
from lowbit.numerics import Int, PerChannel, PerGroup, Spec
from lowbit.transforms import Permute


@dataclass(frozen=True, eq=False)
class Integers:
    """``scale * (code - zero)``.

    Args:
        bits: of a code.
        size: columns of a group.
        codes: uint8 ``[O, I]``.
        scale: ``[O, G]``, in the dtype in which it is stored.
        zero: uint8 ``[O, G]``; None: ``2**(bits-1)``.
    """

    bits: int
    size: int
    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    @staticmethod
    def of(description: LinearDescription, tensors: Mapping[str, Tensor]) -> Integers:
        """Those of a packed layer whose weights are integers per group or channel."""
        grid, (rows, columns) = description.spec.grid, description.shape
        assert isinstance(grid, Int)
        size = group_size(description.spec, columns)
        assert size is not None
        codes, scale = unpack(tensors["codes"], grid.bits, columns), tensors["scale"]
        zero = None if grid.symmetric else unpack(tensors["zero"], grid.bits, scale.numel()).view(rows, -1)
        return Integers(grid.bits, size, codes, scale, zero)

    def layer(
        self, bias: Tensor | None = None, group: Tensor | None = None
    ) -> tuple[LinearDescription, dict[str, Tensor]]:
        """The packed layer and its tensors.

        Args:
            bias: of the layer.
            group: the group of each column, ``[I]``; None: they are runs. Others come with the order of columns that makes them runs.

        Raises:
            ValueError: groups of other sizes than ``size``.
        """
        rows, columns = self.codes.shape
        runs = torch.arange(columns) // self.size
        if group is not None and not torch.equal(group.long(), runs):
            index = group.argsort(stable=True)
            if not torch.equal(group[index].long(), runs):
                raise ValueError(f"groups of other sizes than {self.size}")
            description, tensors = replace(self, codes=self.codes[:, index]).layer(bias)
            order = (Permute(index),)
            described = replace(description, pre=serialize_transforms.describe("pre", order))
            return described, tensors | serialize_transforms.tensors("pre", order)
        grid = Int(self.bits, symmetric=self.zero is None)
        dtype = str(self.scale.dtype).removeprefix("torch.")
        spec = Spec(grid, PerGroup(self.size) if self.scale.shape[1] > 1 else PerChannel(), scale_dtype=dtype)
        tensors = {"codes": pack(self.codes.contiguous(), self.bits), "scale": self.scale.contiguous()}
        if self.zero is not None:
            tensors["zero"] = pack(self.zero.reshape(-1).contiguous(), self.bits)
        if bias is not None:
            tensors["bias"] = bias
        description = LinearDescription(spec, (rows, columns), None if bias is None else bias.dtype)
        return description, tensors

    @property
    def zeros(self) -> Tensor:
        """Zero points, also of symmetric integers, uint8 ``[O, G]``."""
        if self.zero is not None:
            return self.zero
        return torch.full(self.scale.shape, 2 ** (self.bits - 1), dtype=torch.uint8)


def size_of_groups(said: int | None, columns: int, groups: int) -> int:
    """Columns of a group of a row, of which a config says ``said`` (none or -1: all) and there are ``groups``.

    Raises:
        ValueError: neither they nor groups of equal size are as many.
    """
    size = min(said, columns) if said is not None and said > 0 else columns
    if -(-columns // size) == groups:
        return size
    if columns % groups:  # of layers with a size of their own
        raise ValueError(f"{groups} groups of {columns} inputs, where config.json says a size of {said}")
    return columns // groups


def words(codes: Tensor, bits: int) -> Tensor:
    """Rows of codes, uint8 ``[R, n]``, as rows of words, int32 ``[R, ceil(n * bits / 32)]``."""
    stream = pack(codes.contiguous(), bits)
    filled = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 4))
    return (
        filled.reshape(-1).view(torch.int32).view(len(codes), -1)
    )  # flat, as strides of one row or column may be anything


def codes_of(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of :func:`words` for rows of ``count`` codes."""
    stream = packed.reshape(-1).view(torch.uint8).view(len(packed), -1)[:, : -(-count * bits // 8)]
    return unpack(stream.contiguous(), bits, count)
