"""plan: what comes out of a run, how large it is, and what the run takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any

from lowbit.numerics import PerCluster, to_dict
from lowbit.plan.cache import PlannedCache, calibration_bytes, planned_cache
from lowbit.plan.compatibility import compatibility, kernel_reasons
from lowbit.plan.for_format import plan_for
from lowbit.plan.kept import KeepDtype
from lowbit.plan.layers import PlannedLayer, planned_layers, ragged_groups
from lowbit.plan.model_plan import ModelPlan, edge_notes, layer_bytes, outside_bytes, rest_of_block
from lowbit.plan.peak import peak_disk_bytes, peak_parts
from lowbit.recipes import Recipe


@dataclass(frozen=True)
class Plan:
    """What a run would give and cost.

    Attributes:
        name: the model's name.
        recipe: as plain data.
        architecture: name of the architecture's table.
        layers: every matrix of the model, quantized or not.
        bytes_in: bytes of all tensors of the original checkpoint.
        bytes_out: bytes of all tensors that will be written; file headers, a few KiB for each block, are not counted.
            Exact where no solver and no search decides. Column orders and copied channels that may be stored are
            counted; weights kept in half precision are not. Biases that a shift adds to experts are counted even if no
            calibration token reaches the expert.
        bits_per_weight: all stored bits of the quantized linears over their number of weights, counted in the same way.
        model_bits_per_weight: bits of ``bytes_out`` over the number of the original's parameters.
        peak_ram_bytes: an estimate, see :mod:`lowbit.plan.peak`.
        peak_ram_parts: terms of the estimate, by moment of the run.
        peak_disk_bytes: bytes of temporary files (activations beyond the memory limit, Fisher information), without the
            checkpoint.
        cache: the bytes of keys and values of one sequence; None where nothing is known of them.
        warnings: what the user should know and may accept.
        compatibility: by runtime or format, ``yes: ...`` or ``no: ...`` with the reason.
    """

    name: str
    recipe: dict[str, Any]
    architecture: str
    layers: tuple[PlannedLayer, ...]
    bytes_in: int
    bytes_out: int
    bits_per_weight: float
    model_bits_per_weight: float
    peak_ram_bytes: int
    peak_disk_bytes: int
    warnings: tuple[str, ...]
    compatibility: dict[str, str]
    peak_ram_parts: dict[str, dict[str, int]] = field(default_factory=dict)
    cache: PlannedCache | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        cache = None if self.cache is None else vars(self.cache)
        layers = [layer.to_dict() for layer in self.layers]
        return vars(self) | {"layers": layers, "warnings": list(self.warnings), "cache": cache}


def plan(
    model: str | PathLike[str],
    recipe: Recipe | str | Path | dict[str, Any],
    *,
    samples: int = 32,
    seq_len: int = 512,
    context: int | None = None,
    ram_limit: int = 2**32,
    keep_dtype: KeepDtype = "auto",
    format: str = "native",
    trust_remote_code: bool = False,
) -> Plan:
    """What quantizing ``model`` by ``recipe`` would give and cost, from config.json and shard headers. Reads no weight.

    Args:
        model, recipe: as for :func:`lowbit.quantize`.
        samples, seq_len: number and length of calibration windows; ``samples=0`` for a run without calibration text.
        context: tokens of a sequence whose cache is counted; None: as many as the model was made for.
        ram_limit: bytes of activations in memory; more go to files.
        keep_dtype, format: as for :func:`lowbit.quantize`.
        trust_remote_code: allow the model's own Python code.

    Raises:
        ValueError: what a run would refuse: a model that cannot be opened or is quantized already, a rule that matches
            no layer, a format that a layer cannot have.
    """
    checked = plan_for(model, recipe, format, keep_dtype=keep_dtype, trust_remote_code=trust_remote_code)
    layers = planned_layers(checked)
    quantized = [layer for layer in layers if not layer.reason and layer.role not in ("embedding", "head")]
    weights = sum(prod(layer.shape) for layer in quantized)
    parts = peak_parts(checked, samples, seq_len, ram_limit)
    bytes_out, parameters = _bytes_out(checked), sum(prod(x.shape) for x in checked.source.headers.values())
    return Plan(
        name=checked.source.name,
        recipe=to_dict(checked.recipe),
        architecture=checked.architecture.name,
        layers=layers,
        bytes_in=sum(header.nbytes for header in checked.source.headers.values()),
        bytes_out=bytes_out,
        bits_per_weight=sum(layer.bits_per_weight * prod(layer.shape) for layer in quantized) / max(1, weights),
        model_bits_per_weight=8 * bytes_out / parameters,
        peak_ram_bytes=max(sum(terms.values()) for terms in parts.values()),
        peak_disk_bytes=peak_disk_bytes(checked, samples, seq_len, ram_limit),
        warnings=tuple(_warnings(checked, layers, samples, seq_len)),
        compatibility=compatibility(checked),
        peak_ram_parts=parts,
        cache=planned_cache(checked.source, checked.recipe.scheme.cache, context),
    )


def _bytes_out(plan: ModelPlan) -> int:
    rest = sum(rest_of_block(plan, block) for block in plan.blocks)
    rest += calibration_bytes(plan.source.config, plan.recipe.scheme.cache)
    packed = sum(layer_bytes(plan, layer) for *_, layer in plan.layers)
    return outside_bytes(plan) + rest + packed


def _warnings(plan: ModelPlan, layers: tuple[PlannedLayer, ...], samples: int, seq_len: int) -> list[str]:
    acts = [layer.format.act for *_, layer in plan.layers if layer.format.act is not None]
    found = (*plan.architecture.warnings, *plan.source.warnings, *plan.problems)
    warnings = [*found, *ragged_groups(plan), *edge_notes(plan)]
    slow = kernel_reasons(plan).get("reference")
    if acts and slow:
        warnings.append(
            f"activations are quantized, but no fast kernel computes {slow} with them: they are rounded and multiplied in "
            "floating point, which shows the accuracy and saves no time"
        )
    if any(isinstance(act.spec.granularity, PerCluster) for act in acts):
        warnings.append(
            "inputs have a range for each cluster of channels, which no integer kernel sums: they are rounded at run time and "
            "multiplied in floating point, which saves memory for weights and no time"
        )
    if any(act.static for act in acts):
        warnings.append(
            f"static activation ranges are fixed by the {samples} x {seq_len} calibration tokens; larger inputs are clipped"
        )
    orders = sum(layer.order_bytes for *_, layer in plan.layers)
    if orders:
        warnings.append(f"the solver stores a column order with each layer: up to {orders} bytes, counted in bytes_out")
    untrained = not any(stage.learns for stage in plan.recipe.stages[1:])
    if untrained and not all(plan.description(layer).is_affine for *_, layer in plan.layers):
        warnings.append(
            "linears normalize their outputs, which those of the original do not: the result computes something else and must be "
            "trained"
        )
    if any(layer.outliers for *_, layer in plan.layers):
        warnings.append("the solver keeps weights in half precision as it finds them; bytes_out does not count them")
    warnings += [step.upper_bound for step in plan.recipe.steps if step.upper_bound]
    if plan.recipe.needs_calibration and samples < 1:
        warnings.append(f"recipe {plan.recipe.name!r} needs calibration text, but samples is {samples}")
    if plan.recipe.changes_weights and not any(not layer.reason for layer in layers):
        warnings.append("nothing is quantized: every linear is skipped")
    return warnings
