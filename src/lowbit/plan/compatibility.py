"""Who can run what a recipe makes: this package, and the formats that others read.

This version writes the native checkpoint only. For each other format the answer is therefore no, with what a writer would
find: whether the numbers chosen by the recipe have a place in that format at all. The rules are those of the formats as
their own packages read them (compressed-tensors 0.20, GPTQ's v2 layout, gguf 0.19).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lowbit.kernels import PackedLinear, explain, native
from lowbit.layouts import Layout
from lowbit.modules import ActSpec
from lowbit.numerics import Int, PerChannel, PerGroup, PerTensor, PerToken, Spec
from lowbit.plan.model_plan import ModelPlan
from lowbit.steps import LayerDescription


def compatibility(plan: ModelPlan) -> dict[str, str]:
    """``yes: ...`` or ``no: ...`` by the name of a runtime or format."""
    kernels = kernel_reasons(plan)
    ordered = any(layer.ordered for *_, layer in plan.layers)
    order = "a column order is stored with its groups" if ordered else ""
    beside = _beside(plan)
    biases = "shifts add biases that the model's class does not have" if _adds_biases(plan) else ""
    shapes = _shapes(plan)
    return {
        "lowbit": "yes: " + "; ".join(f"kernel {name} for {roles}" for name, roles in kernels.items()),
        "transformers (import lowbit)": "yes: AutoModelForCausalLM.from_pretrained(DIR) after `import lowbit`",
        "vLLM / compressed-tensors": _answer(biases, beside, order, *(_compressed_tensors(*shape) for shape in shapes)),
        "llama.cpp GGUF": _answer(biases, beside, order, *(_gguf(*shape) for shape in shapes)),
        "GPTQ format": _answer(biases, beside, *(_gptq(*shape) for shape in shapes), _one_format(shapes)),
    }


_TRANSFORMS = {
    "Scale": "scales",
    "Shift": "shifts",
    "Permute": "orders",
    "Rotate": "rotations",
    "Kronecker": "rotations",
    "RandomHadamard": "rotations",
    "Split": "copies of channels",
    "Merge": "means of channels",
    "Reassembly": "copies and means of channels",
}
_SIDE_TERMS = {"LowRank": "low-rank corrections"}


def _beside(plan: ModelPlan) -> str:
    """What layers do or hold apart from their codes that no other format has a place for."""
    held: dict[str, None] = {}
    for *_, layer in plan.layers:
        for end, entries in (("inputs", layer.pre), ("outputs", layer.post)):
            held |= {f"{_TRANSFORMS[entry['type']]} of {end}": None for entry in entries}
        held |= {_SIDE_TERMS[entry["type"]]: None for entry in layer.side}
        held |= {"outliers in half precision": None} if layer.outliers else {}
    held |= {"integer operands of attention": None} if plan.recipe.scheme.attention is not None else {}
    return f"layers keep {' and '.join(held)}, for which it has no place" if held else ""


def _answer(*problems: str) -> str:
    reasons = list(dict.fromkeys(problem for problem in problems if problem))
    if reasons:
        return f"no: {'; '.join(reasons)}"
    return "no: this version writes the native format only; the numbers would fit this one as they are"


def _adds_biases(plan: ModelPlan) -> bool:
    return any(block.description.biases for block in plan.blocks)


_Shape = tuple[Spec, ActSpec | None, tuple[int, int]]


def _shapes(plan: ModelPlan) -> list[_Shape]:
    """The distinct pairs of format and matrix size."""
    every = ((layer.format.weight, layer.format.act, block.shapes[path]) for block, path, layer in plan.layers)
    return list(dict.fromkeys(every))


# Kernels of this package


def kernel_reasons(plan: ModelPlan) -> dict[str, str]:
    """Kernel -> what it runs, in words, over the distinct layers; each as it would be chosen for one vector on a CPU."""
    roles: dict[str, dict[str, None]] = {}
    for block, path, layer in plan.layers:
        kernel = chosen_kernel(layer, plan.layout(layer))
        roles.setdefault(kernel, {})[block.resolved.linears[path]] = None
    return {kernel: ", ".join(names) for kernel, names in roles.items()}


def chosen_kernel(described: LayerDescription, layout: Layout) -> str:
    """The kernel that would run the described layer. Allocates nothing: every tensor is one number, expanded."""
    tensors = {name: torch.zeros((), dtype=dtype).expand(shape) for name, (shape, dtype) in layout.items()}
    act = described.format.act
    layer = PackedLinear(described.format.weight, described.shape, tensors, act and act.spec)
    layer = replace(layer, threshold=0.0 if act is None else act.threshold)
    if native.why_unpackable(layer) is None:  # it would be packed when it is loaded
        layer = replace(layer, tiles=torch.empty(0, dtype=torch.uint8))
    return next(reason.kernel for reason in explain(layer, 1) if reason.why_not is None)


# Other formats: why a layer has no place there, or ""


def _integers(spec: Spec, bits: tuple[int, ...]) -> str:
    grid = spec.grid
    if not isinstance(grid, Int) or grid.real_zero or spec.stats is not None:
        return "its weights are integers with integer zero points and plain scales"
    if grid.bits not in bits:
        return f"it has weights of {', '.join(map(str, bits))} bits, not of {grid.bits}"
    return ""


def _group_size(spec: Spec, inputs: int) -> int | None:
    """The run of one row that shares a scale; None where scales are not shared so."""
    grain = spec.granularity
    if isinstance(grain, PerGroup):
        return grain.size
    return inputs if isinstance(grain, PerChannel) else None


def _compressed_tensors(spec: Spec, act: ActSpec | None, shape: tuple[int, int]) -> str:
    problem = _integers(spec, (2, 3, 4, 5, 6, 7, 8))
    if problem:
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
    grain = act.spec.granularity
    fits = isinstance(grain, PerTensor) if act.static else isinstance(grain, PerToken | PerTensor)
    return "" if fits else f"its activations are per token or per tensor, not {grain}"


def _gguf(spec: Spec, act: ActSpec | None, shape: tuple[int, int]) -> str:
    size = _group_size(spec, shape[1])
    problem = _integers(spec, (4, 5, 8))
    if problem:
        return problem
    assert isinstance(spec.grid, Int)
    if not spec.grid.symmetric:
        return "its blocks of integers with an offset store it in half precision, which rounds these zero points"
    if size is None or size % 32 or shape[1] % 32:
        return f"its blocks are 32 inputs with one scale; these weights ({shape[1]} inputs) are {spec.granularity}"
    return "" if act is None else "it says nothing of activations: its runtime quantizes them in its own way"


def _gptq(spec: Spec, act: ActSpec | None, shape: tuple[int, int]) -> str:
    size = _group_size(spec, shape[1])
    problem = _integers(spec, (2, 3, 4, 8))
    if problem or act is not None:
        return problem or "it is for weights only: quantized activations have no place in it"
    if size is None or shape[1] % size:
        return f"its groups divide a row; these weights ({shape[1]} inputs) are {spec.granularity}"
    if shape[0] % 32 or shape[1] % 32:
        return f"its rows and columns are multiples of 32, found {shape[0]} x {shape[1]}"
    return ""


def _one_format(shapes: list[_Shape]) -> str:
    return "it has one format for all layers, the recipe several" if len({spec for spec, *_ in shapes}) > 1 else ""
