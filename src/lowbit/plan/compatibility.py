"""Who can run what a recipe makes: this package, and the formats that others read.

This version writes the native checkpoint only. For each other format the answer is therefore no, with what a writer would
find: whether the numbers chosen by the recipe have a place in that format at all. The rules are those of the formats as
their own packages read them (compressed-tensors 0.20, GPTQ's v2 layout, gguf 0.19).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lowbit.kernels import PackedLinear, explain, native
from lowbit.modules import ActSpec, buffer_layout
from lowbit.modules.quant_linear import Config
from lowbit.numerics import Int, PerChannel, PerGroup, PerTensor, PerToken, Spec, from_dict
from lowbit.plan.survey import Survey
from lowbit.steps import (
    Cluster,
    Incoherence,
    Learn,
    LowRankCorrection,
    RotateInputs,
    SearchReassembly,
    Set,
)


def compatibility(found: Survey) -> dict[str, str]:
    """``yes: ...`` or ``no: ...`` by the name of a runtime or format."""
    kernels = kernel_reasons(found)
    ordered = any(found.order_bytes(block, path) for block in found.blocks for path in block.formats)
    order = "a column order is stored with its groups" if ordered else ""
    beside = _beside(found)
    biases = "shifts add biases that the model's class does not have" if _adds_biases(found) else ""
    shapes = _shapes(found)
    return {
        "lowbit": "yes: " + "; ".join(f"kernel {name} for {roles}" for name, roles in kernels.items()),
        "transformers (import lowbit)": "yes: AutoModelForCausalLM.from_pretrained(DIR) after `import lowbit`",
        "vLLM / compressed-tensors": _answer(biases, beside, order, *(_compressed_tensors(*shape) for shape in shapes)),
        "llama.cpp GGUF": _answer(biases, beside, order, *(_gguf(*shape) for shape in shapes)),
        "GPTQ format": _answer(biases, beside, *(_gptq(*shape) for shape in shapes), _one_format(shapes)),
    }


def _beside(found: Survey) -> str:
    """What layers do or hold beside their codes that no other format has a place for."""
    steps = found.recipe.steps
    parts = {
        "rotations of inputs and outputs": any(isinstance(step, Incoherence) for step in steps),
        "rotations of inputs": any(isinstance(step, RotateInputs) for step in steps),
        "scales of inputs": any(isinstance(step, Set) and step.run_time for step in steps),
        "copies and means of input channels": any(isinstance(step, SearchReassembly) and step.ratio for step in steps),
        "low-rank corrections": any(
            isinstance(maker, LowRankCorrection) and not maker.fold
            for step in steps
            if isinstance(step, Learn)
            for maker in step.makers
        ),
        "orders of inputs": any(isinstance(step, Cluster) for step in steps) and any(b.gathers for b in found.blocks),
        "integer operands of attention": found.recipe.scheme.attention is not None,
        "outliers in half precision": getattr(steps[-1].solver, "outliers", None) is not None,
    }
    held = [what for what, there in parts.items() if there]
    return f"layers keep {' and '.join(held)}, for which it has no place" if held else ""


def _answer(*problems: str) -> str:
    found = list(dict.fromkeys(problem for problem in problems if problem))
    if found:
        return f"no: {'; '.join(found)}"
    return "no: this version writes the native format only; the numbers would fit this one as they are"


def _adds_biases(found: Survey) -> bool:
    return any(found.new_biases(block) for block in found.blocks)


_Shape = tuple[Spec, ActSpec | None, tuple[int, int]]


def _shapes(found: Survey) -> list[_Shape]:
    """The distinct pairs of format and matrix size."""
    all_of_them = (
        (form.weight, form.act, block.shape(path)) for block in found.blocks for path, form in block.formats.items()
    )
    return list(dict.fromkeys(all_of_them))


# Kernels of this package


def kernel_reasons(found: Survey) -> dict[str, str]:
    """Kernel -> what it runs, in words, over the distinct layers; each as it would be chosen for one vector on a CPU."""
    roles: dict[str, dict[str, None]] = {}
    for block in found.blocks:
        for path in block.formats:
            kernel = chosen_kernel(found.config(block, path))
            roles.setdefault(kernel, {})[block.resolved.linears[path]] = None
    return {kernel: ", ".join(names) for kernel, names in roles.items()}


def chosen_kernel(config: Config) -> str:
    """The kernel that would run the described layer. Allocates nothing: every tensor is one number, expanded."""
    tensors = {name: torch.zeros((), dtype=d).expand(s) for name, (s, d) in buffer_layout(config).items()}
    act = from_dict(config["act"])
    layer = PackedLinear(from_dict(config["spec"]), tuple(config["shape"]), tensors, act and act.spec)
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
