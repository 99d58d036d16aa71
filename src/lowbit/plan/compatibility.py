"""Compatibility: who can run the result of a recipe, this package and readers of other formats.

Each format's class (:mod:`lowbit.checkpoints.formats`) gives the reason why it cannot hold a model. ``plan`` asks it
with the description of the model that the recipe would make, ``lowbit export`` with the checkpoint's.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lowbit.checkpoints import formats
from lowbit.checkpoints.description import ModelDescription
from lowbit.checkpoints.fold_residual import without_residual
from lowbit.kernels import PackedLinear, explain, native
from lowbit.modules import LinearDescription, serialize_transforms
from lowbit.numerics import Sparse
from lowbit.plan.model_plan import ModelPlan
from lowbit.steps import LayerDescription
from lowbit.transforms import Permute


def compatibility(plan: ModelPlan) -> dict[str, str]:
    """``yes: ...`` or ``no: ...`` for each runtime and format, by name."""
    kernels = kernel_reasons(plan)
    whole, biases = model_description(plan), new_biases(plan)
    answers = {
        "lowbit": "yes: " + ("; ".join(f"kernel {name} for {roles}" for name, roles in kernels.items()) or "as it is"),
        "transformers (import lowbit)": "yes: AutoModelForCausalLM.from_pretrained(DIR) after `import lowbit`",
    }
    for file_format in formats.FORMATS:
        description = whole if file_format.turns_residual else without_residual(whole, plan.source.config)
        reason = file_format.why_not(description, biases, plan.source.config)
        reason = reason or file_format.why_not_files(plan.source.path, plan.source.config)
        yes = f"yes: lowbit export DIR --format {file_format.name}"
        answers[file_format.title] = yes if reason is None else f"no: {reason}"
    return answers


def new_biases(plan: ModelPlan) -> list[str]:
    """Names of the linears that will have a bias though the model's class gives them none."""
    return [f"{block.name}.{path}" for block in plan.blocks for path in block.description.biases]


def model_description(plan: ModelPlan) -> ModelDescription:
    """The description of the checkpoint that a run would write, as far as it is known before the run.

    Sizes that a search or a solver chooses are upper bounds. Numbers of outliers are unknown.
    """
    layers = {
        f"{block.name}.{path}": _with_solver(plan.description(layer), layer) for block, path, layer in plan.layers
    }
    return ModelDescription(
        layers={**layers, **plan.outside.layers},
        attention={
            f"{block.name}.{path}": spec for block in plan.blocks for path, spec in block.description.attention.items()
        },
        kv=plan.recipe.scheme.kv,
        kv_overrides=plan.recipe.scheme.kv_overrides,
        residual=plan.residual,
        embeddings=plan.outside.embeddings,
        tied_heads=plan.outside.tied_heads,
    )


def _with_solver(description: LinearDescription, layer: LayerDescription) -> LinearDescription:
    """``description`` with the transforms and side terms that the solver may add to the linear."""
    pre, side_terms = (), ()
    if layer.ordered:
        pre = serialize_transforms.describe("pre", [Permute(torch.arange(description.shape[1]))])
    if layer.outliers:
        start, none = torch.zeros(description.shape[0] + 1, dtype=torch.int32), torch.zeros(0)
        side_terms = serialize_transforms.describe("side", [Sparse(start, none.to(torch.int16), none.half())])
    return replace(description, pre=(*description.pre, *pre), side_terms=(*side_terms, *description.side_terms))


# Kernels of this package


def kernel_reasons(plan: ModelPlan) -> dict[str, str]:
    """Kernel -> the roles that it runs, in words. Kernels are those chosen for one vector on a CPU."""
    roles: dict[str, dict[str, None]] = {}
    for block, path, layer in plan.layers:
        kernel = chosen_kernel(plan.description(layer))
        roles.setdefault(kernel, {})[block.resolved.linears[path]] = None
    return {kernel: ", ".join(names) for kernel, names in roles.items()}


def chosen_kernel(description: LinearDescription) -> str:
    """The kernel that would run the described layer for one vector. Allocates no memory for it."""
    tensors = {name: torch.zeros((), dtype=d).expand(s) for name, (s, d) in description.layout().items()}
    act = description.act
    layer = PackedLinear(description.spec, description.shape, tensors, act and act.spec)
    layer = replace(layer, threshold=0.0 if act is None else act.threshold)
    if native.why_unpackable(layer) is None:  # loading would pack it
        layer = replace(layer, tiles=torch.empty(0, dtype=torch.uint8))
    return next(reason.kernel for reason in explain(layer, 1) if reason.why_not is None)
