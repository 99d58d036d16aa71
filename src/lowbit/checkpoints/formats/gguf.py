"""GGUF, the format of llama.cpp, as the package gguf 0.19 reads it."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from lowbit.checkpoints.description import ModelDescription
from lowbit.checkpoints.formats.base import WithoutWriter, beside_codes, biases, group_size, integers, shapes
from lowbit.modules import ActSpec
from lowbit.numerics import Int, Spec


class Gguf(WithoutWriter):
    """Symmetric integers of 4, 5 or 8 bits in blocks of 32 inputs; weights only."""

    name = "gguf"
    title = "llama.cpp GGUF"

    def problems(self, description: ModelDescription, new_biases: Collection[str]) -> Iterator[str]:
        yield from biases(new_biases)
        yield from beside_codes(description)
        for shape in shapes(description):
            if problem := _problem(*shape):
                yield problem


def _problem(spec: Spec, act: ActSpec | None, shape: tuple[int, int]) -> str:
    if problem := integers(spec, (4, 5, 8)):
        return problem
    assert isinstance(spec.grid, Int)
    if not spec.grid.symmetric:
        return "its blocks of integers with an offset store it in half precision, which rounds these zero points"
    size = group_size(spec, shape[1])
    if size is None or size % 32 or shape[1] % 32:
        return f"its blocks are 32 inputs with one scale; these weights ({shape[1]} inputs) are {spec.granularity}"
    return "" if act is None else "it does not describe activations: its runtime quantizes them in its own way"
