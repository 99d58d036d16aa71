"""compressed-tensors, the format of vLLM and llm-compressor, as its package 0.20 reads it."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from lowbit.checkpoints.description import ModelDescription
from lowbit.checkpoints.formats.base import WithoutWriter, beside_codes, biases, integers, shapes
from lowbit.modules import ActSpec
from lowbit.numerics import Int, PerChannel, PerGroup, PerTensor, PerToken, Spec


class CompressedTensors(WithoutWriter):
    """Integers of 2 to 8 bits per group, channel or tensor; activations of 8 bits per token or tensor."""

    name = "compressed-tensors"
    title = "vLLM / compressed-tensors"

    def problems(self, description: ModelDescription, new_biases: Collection[str]) -> Iterator[str]:
        yield from biases(new_biases)
        yield from beside_codes(description)
        for shape in shapes(description):
            if problem := _problem(*shape):
                yield problem


def _problem(spec: Spec, act: ActSpec | None, shape: tuple[int, int]) -> str:
    if problem := integers(spec, (2, 3, 4, 5, 6, 7, 8)):
        return problem
    if not isinstance(spec.granularity, PerGroup | PerChannel | PerTensor):
        return f"its weights are per group, channel or tensor, not {spec.granularity}"
    if isinstance(spec.granularity, PerGroup) and shape[1] % spec.granularity.size:
        return f"its groups divide a row; {spec.granularity.size} does not divide {shape[1]}"
    if act is None:
        return ""
    if act.threshold:
        return "its activations are quantized whole, with no channel taken out at run time"
    both = (spec.grid, act.spec.grid)
    if not all(isinstance(grid, Int) and grid.bits == 8 for grid in both) or isinstance(spec.granularity, PerGroup):
        return "with quantized activations it has integers of 8 bits, weights per channel or tensor"
    granularity = act.spec.granularity
    fits = isinstance(granularity, PerTensor) if act.static else isinstance(granularity, PerToken | PerTensor)
    return "" if fits else f"its activations are per token or per tensor, not {granularity}"
