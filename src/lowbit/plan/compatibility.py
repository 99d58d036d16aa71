"""Who can run what a recipe makes: this package, and the formats that others read.

What a file format cannot hold is asked of the format's own class (:mod:`lowbit.checkpoints.formats`), with the description
of the model that the recipe would make. ``lowbit export`` asks the same class about the checkpoint.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lowbit.architectures import attention_modules
from lowbit.checkpoints import formats
from lowbit.checkpoints.description import ModelDescription
from lowbit.kernels import PackedLinear, explain, native
from lowbit.modules import LinearDescription, PartDescription, serialize_transforms
from lowbit.numerics import Sparse
from lowbit.plan.survey import Survey, SurveyedBlock
from lowbit.transforms import Permute


def compatibility(found: Survey) -> dict[str, str]:
    """``yes: ...`` or ``no: ...`` by the name of a runtime or format."""
    kernels = kernel_reasons(found)
    description = model_description(found)
    new_biases = [f"{block.name}.{path}" for block in found.blocks for path in found.new_biases(block)]
    answers = {
        "lowbit": "yes: " + "; ".join(f"kernel {name} for {roles}" for name, roles in kernels.items()),
        "transformers (import lowbit)": "yes: AutoModelForCausalLM.from_pretrained(DIR) after `import lowbit`",
    }
    for file_format in formats.FORMATS:
        reason = file_format.why_not(description, new_biases)
        yes = f"yes: lowbit export DIR --format {file_format.name}"
        answers[file_format.title] = yes if reason is None else f"no: {reason}"
    return answers


def model_description(found: Survey) -> ModelDescription:
    """The description of the checkpoint that a run would write, as far as it is known before: sizes of what a search or a
    solver chooses are bounds, and those of outliers are unknown."""
    attention = found.recipe.scheme.attention
    layers, attends = {}, {}
    for block in found.blocks:
        if attention is not None:
            attends |= {f"{block.name}.{path}": attention for path in attention_modules(block.resolved)}
        for path in block.formats:
            description = found.description(block, path)
            pre, side_terms = _of_solver(found, block, path, description)
            layers[f"{block.name}.{path}"] = replace(
                description, pre=(*description.pre, *pre), side_terms=(*side_terms, *description.side_terms)
            )
    return ModelDescription(
        layers,
        attention=attends,
        residual=found.residual,
    )


def _of_solver(
    found: Survey, block: SurveyedBlock, path: str, description: LinearDescription
) -> tuple[tuple[PartDescription, ...], tuple[PartDescription, ...]]:
    """Transforms of the input and side terms that the solver may store with a linear."""
    pre, side_terms = (), ()
    if found.order_bytes(block, path):
        pre = serialize_transforms.describe("pre", [Permute(torch.arange(description.shape[1]))])
    if getattr(found.recipe.steps[-1].solver, "outliers", None) is not None:
        start, none = torch.zeros(description.shape[0] + 1, dtype=torch.int32), torch.zeros(0)
        side_terms = serialize_transforms.describe("side", [Sparse(start, none.to(torch.int16), none.half())])
    return pre, side_terms


# Kernels of this package


def kernel_reasons(found: Survey) -> dict[str, str]:
    """Kernel -> what it runs, in words, over the distinct layers; each as it would be chosen for one vector on a CPU."""
    roles: dict[str, dict[str, None]] = {}
    for block in found.blocks:
        for path in block.formats:
            kernel = chosen_kernel(found.description(block, path))
            roles.setdefault(kernel, {})[block.resolved.linears[path]] = None
    return {kernel: ", ".join(names) for kernel, names in roles.items()}


def chosen_kernel(description: LinearDescription) -> str:
    """The kernel that would run the described layer. Allocates nothing: every tensor is one number, expanded."""
    tensors = {name: torch.zeros((), dtype=d).expand(s) for name, (s, d) in description.layout().items()}
    act = description.act
    layer = PackedLinear(description.spec, description.shape, tensors, act and act.spec)
    layer = replace(layer, threshold=0.0 if act is None else act.threshold)
    if native.why_unpackable(layer) is None:  # it would be packed when it is loaded
        layer = replace(layer, tiles=torch.empty(0, dtype=torch.uint8))
    return next(reason.kernel for reason in explain(layer, 1) if reason.why_not is None)
