"""Bijections between codes and bytes. Knows no module and no model."""

from lowbit.layouts.bitstream import pack, packed_width, unpack
from lowbit.layouts.canonical import Layout, pack_qtensor, packed_layout, unpack_params, unpack_qtensor

__all__ = [
    "Layout",
    "pack",
    "pack_qtensor",
    "packed_layout",
    "packed_width",
    "unpack",
    "unpack_params",
    "unpack_qtensor",
]
