"""The GPTQ format in its version 2, as GPTQModel and transformers read it."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from lowbit.checkpoints.description import ModelDescription
from lowbit.checkpoints.formats.base import WithoutWriter, beside_codes, biases, group_size, integers, shapes
from lowbit.modules import ActSpec
from lowbit.numerics import Spec


class Gptq(WithoutWriter):
    """One format of integers for all layers, by groups in any column order; weights only."""

    name = "gptq"
    title = "GPTQ format"

    def problems(self, description: ModelDescription, new_biases: Collection[str]) -> Iterator[str]:
        yield from biases(new_biases)
        yield from beside_codes(description, order=True)
        distinct = shapes(description)
        for shape in distinct:
            if problem := _problem(*shape):
                yield problem
        if len({spec for spec, *_ in distinct}) > 1:
            yield "it has one format for all layers, the model several"


def _problem(spec: Spec, act: ActSpec | None, shape: tuple[int, int]) -> str:
    problem = integers(spec, (2, 3, 4, 8))
    if problem or act is not None:
        return problem or "it is for weights only: quantized activations have no place in it"
    size = group_size(spec, shape[1])
    if size is None or shape[1] % size:
        return f"its groups divide a row; these weights ({shape[1]} inputs) are {spec.granularity}"
    if shape[0] % 32 or shape[1] % 32:
        return f"its rows and columns are multiples of 32, found {shape[0]} x {shape[1]}"
    return ""
