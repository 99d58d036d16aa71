"""A request for a run, checked: everything that can be known to be wrong is found before the first block."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf, prod
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowbit.checkpoints import native
from lowbit.checkpoints.formats import find_format
from lowbit.checkpoints.imatrix import is_imatrix, names_of, read_imatrix
from lowbit.checkpoints.locate import gguf_file
from lowbit.checkpoints.source import ModelSource
from lowbit.checkpoints.target import check_target
from lowbit.data import Bos, Calibration, CalibrationText, calibration_of, drawn_tokens, ids_sha256
from lowbit.decoding.packed_cache import simulated_cache
from lowbit.numerics import SquareSum, to_dict
from lowbit.plan.for_format import plan_for, stand_ins, why_not
from lowbit.plan.kept import KeepDtype
from lowbit.plan.layers import ragged_groups
from lowbit.plan.model_plan import ModelPlan
from lowbit.recipes import Recipe, Train, as_recipe
from lowbit.stages.journal import settle
from lowbit.stages.stream import check_blocks_run_alone
from lowbit.steps.precision import product_type
from lowbit.surroundings import own_settings
from lowbit.version import __version__

NATIVE = native.Native.name


@dataclass(frozen=True)
class Importance:
    """Squares of inputs that a file holds, in place of calibration text.

    Attributes:
        name: of the file.
        sha256: of the file.
        entries: the results of :class:`~lowbit.numerics.SquareSum` by name of the linear.
        warnings: what the user should know.
    """

    name: str
    sha256: str
    entries: Mapping[str, Tensor]
    warnings: tuple[str, ...] = ()


@dataclass
class Job:
    """A checked request: everything that a run needs, and nothing has been loaded yet."""

    plan: ModelPlan
    calibration: Calibration | None
    tokenizer: Any
    out: Path
    source_bytes: int
    warnings: list[str] = field(default_factory=list)
    max_bits: float = inf
    importance: Importance | None = None

    @property
    def source(self) -> ModelSource:
        return self.plan.source

    @property
    def recipe(self) -> Recipe:
        return self.plan.recipe

    def windows(self) -> tuple[Tensor, int]:
        """All windows of a run, and how many of them, at the end, no step sees. A run without text has drawn tokens."""
        if self.calibration is None:
            return drawn_tokens(self.source), 0
        if self._held_out is None:
            return self.calibration.ids, 0
        return torch.cat([self.calibration.ids, self._held_out]), len(self._held_out)

    @property
    def _held_out(self) -> Tensor | None:
        """Windows that only the result is measured on. Where no step reads text, those of the calibration serve."""
        return None if self.calibration is None or not self.recipe.reads_text else self.calibration.held_out

    @property
    def header(self) -> dict[str, Any]:
        """What determines the bytes of the result, its report included; a partial run is continued only where all of it is the same."""
        further = None if self.calibration is None else self.calibration.further
        given = {} if self.importance is None else {"importance": self.importance.sha256}
        return (
            {
                "lowbit": __version__,
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "model": self.source.fingerprint,
                "recipe": to_dict(self.recipe),
                "products": product_type(torch.device("cpu"), self.recipe.compute),
                "keep_dtype": self.plan.kept.choice,
                "calibration": None if self.calibration is None else self.calibration.sha256,
                "held_out": None if self._held_out is None else ids_sha256(self._held_out),
            }
            | given
            | ({} if further is None else {"training": ids_sha256(further)})
        )

    @property
    def calibrated_on(self) -> str:
        """What the steps learn from, for reports."""
        if self.importance is not None:
            return f"importance matrix {self.importance.name}"
        return "none" if self.calibration is None else f"{self.calibration.name}, {list(self.calibration.ids.shape)}"


@own_settings()
def prepare(
    model: str | PathLike[str] | PreTrainedModel,
    recipe: Recipe | str | Path | Mapping[str, Any],
    calibration: CalibrationText | None,
    *,
    out: str | PathLike[str],
    samples: int = 32,
    seq_len: int = 512,
    bos: Bos = "auto",
    keep_dtype: KeepDtype = "auto",
    max_bits: float = inf,
    format: str = "native",
    trust_remote_code: bool = False,
) -> Job:
    """Checks recipe, target, model and text, in the order of what is cheapest to find out. Arguments as of :func:`quantize`.

    The run of another format than the native one leaves a native checkpoint beside its target, which :func:`exported` replaces.

    Raises:
        ValueError: the first thing that is wrong, with what to do.
    """
    recipe, out, file_format = as_recipe(recipe), Path(out).expanduser().resolve(), find_format(format)
    if file_format.name != NATIVE:
        check_target(out)
        out = beside(out)
    settle(out)
    check_target(out)
    plan = plan_for(model, recipe, format, keep_dtype=keep_dtype, trust_remote_code=trust_remote_code)
    recipe = plan.recipe
    if file_format.name != NATIVE and (reason := why_not(plan, file_format)):
        raise ValueError(f"the result could not be written as {file_format.title}: {reason}")
    if recipe.changes_weights and not any(block.formats for block in plan.blocks):
        raise ValueError(
            f"recipe {recipe.name!r} quantizes no linear of this model: every rule skips; leave an override out"
        )
    gguf = gguf_file(model)
    source_bytes = sum(x.nbytes for x in plan.source.headers.values()) if gguf is None else gguf.stat().st_size
    known = [*plan.architecture.warnings, *plan.source.warnings, *ragged_groups(plan), *stand_ins(plan, file_format)]
    job = Job(plan, None, None, out, source_bytes, known, max_bits)
    if max_bits < inf and (planned := _planned_bits(plan)) > max_bits:
        raise ValueError(
            f"recipe {recipe.name!r} stores {planned:.3f} bits a weight in this model, over the limit {max_bits:g}; choose "
            "fewer bits, larger groups or another method, or raise max_bits"
        )
    if isinstance(calibration, str | PathLike) and is_imatrix(file := Path(calibration).expanduser()):
        job.importance, calibration = _importance(plan, file), None
        job.warnings.extend(job.importance.warnings)
    elif calibration is None and recipe.needs_calibration:
        raise ValueError(
            f"recipe {recipe.name!r} needs calibration text: pass a file, python-docs, a hub dataset or self"
        )
    if any(isinstance(stage, Train) and stage.cache for stage in recipe.stages):
        with simulated_cache(plan.source.skeleton(), recipe.scheme.cache):  # refused here where it cannot be simulated
            pass
    if calibration is not None:
        if recipe.changes_weights:
            check_blocks_run_alone(plan.architecture)
        job.calibration = calibration_of(
            plan.source, calibration, samples, seq_len, bos, further=recipe.training_windows(seq_len)
        )
        job.warnings.extend(job.calibration.warnings)
        _check_windows(recipe, job.calibration.ids.shape[1])
    job.tokenizer = plan.source.tokenizer_if_any()
    return job


def _importance(plan: ModelPlan, file: Path) -> Importance:
    """What an importance matrix says of the linears that the recipe quantizes.

    Raises:
        ValueError: a recipe that reads more than squares of inputs, or none; a file that cannot be read or is of another model.
    """
    recipe = plan.recipe
    needs = {need for step in recipe.steps for need in step.needs}
    if needs != {SquareSum()} or len(recipe.steps) > 1 or recipe.learns or recipe.reads_original or recipe.cache_stages:
        raise ValueError(
            f"{file} is an importance matrix, which holds mean squares of inputs, and recipe {recipe.name!r} "
            + ("reads none" if not needs else "reads more than these, or changes the inputs first")
            + "; use --method rtn --set importance=true, or calibration text"
        )
    widths = {f"{b.name}.{path}": b.shapes[path][1] for b in plan.blocks for path in b.resolved.linears}
    wanted = {f"{b.name}.{path}": b.shapes[path][1] for b in plan.blocks for path in b.formats}
    imatrix = read_imatrix(file)
    entries = imatrix.of(names_of(plan.source.config), widths, wanted, file)
    doubts = imatrix.doubts(plan.source.fingerprint, file)
    return Importance(file.name, hashlib.sha256(file.read_bytes()).hexdigest(), entries, doubts)


def _check_windows(recipe: Recipe, tokens: int) -> None:
    """Checks that calibration windows have tokens that the cache packs, where only those count. Raises ValueError."""
    formats = recipe.scheme.cache
    sinks = [spec.sink for spec in (formats.kv, *(rule.kv for rule in formats.overrides)) if spec is not None]
    if any(stage.fit.skips_sinks for stage in recipe.cache_stages) and tokens <= max(sinks):
        raise ValueError(
            f"calibration windows of {tokens} tokens have none behind the first {max(sinks)}, which the cache keeps as they are; "
            "raise seq_len"
        )


def _planned_bits(plan: ModelPlan) -> float:
    """Stored bits for each quantized weight, as far as they are known before the work."""
    bits = sum(plan.description(layer).stored_bits + 8 * layer.order_bytes for *_, layer in plan.layers)
    return bits / max(1, sum(prod(block.shapes[path]) for block in plan.blocks for path in block.formats))


def asked_bits(plan: ModelPlan) -> float:
    """Bits of the codes of each quantized weight: what a recipe is named by."""
    every = [
        (prod(block.shapes[path]), form.weight.grid.bits)
        for block in plan.blocks
        for path, form in block.formats.items()
    ]
    return sum(weights * bits for weights, bits in every) / max(1, sum(weights for weights, _ in every))


def beside(out: Path) -> Path:
    """Where the native checkpoint of a run lies that is then written in another format to ``out``."""
    return out.with_name(f"{out.name}.native")
