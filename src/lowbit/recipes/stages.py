"""Stages: the parts of a run, as frozen values. :mod:`lowbit.stages` runs them.

A stage starts from a model (the original, or the checkpoint of the stage before) and leaves a checkpoint. Packing is
the end of a stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from lowbit.caches import CacheFit
from lowbit.numerics import Fisher, check_types, serializable
from lowbit.scheme import Scheme
from lowbit.steps import Freedom, Step
from lowbit.steps.combination import check_attention_ranges, check_combination
from lowbit.steps.precision import Compute
from lowbit.steps.step import names_of
from lowbit.training import AdamW, Objective, OneCycle, Optimizer, Schedule, Trainable


@runtime_checkable
class Stage(Protocol):
    """One part of a run."""

    @property
    def reads_inputs(self) -> bool:
        """Whether it depends on what the model computes from the calibration text."""
        ...

    @property
    def reads_original(self) -> bool:
        """Whether it compares with what the original model computes from the calibration text."""
        ...

    @property
    def learns(self) -> bool:
        """Whether it computes gradients."""
        ...

    @property
    def needs_fisher(self) -> bool:
        """Whether it needs Fisher information, which takes a backward pass over the whole original model first."""
        ...

    @property
    def cache_parts(self) -> frozenset[str]:
        """What it finds for the cache: buffers of :class:`~lowbit.modules.CacheCalibration`."""
        ...

    @property
    def of_cache(self) -> bool:
        """Whether it is about the cache alone: it runs the finished model on the calibration text, leaves its weights as they
        are, and adds what it finds to the checkpoint."""
        ...

    @property
    def needs_latents(self) -> bool:
        """Whether it needs the weights that the stage before rounded, besides their codes."""
        ...

    @property
    def adapts(self) -> bool:
        """Whether it leaves low-rank terms beside codes, which a later stage can train."""
        ...

    @property
    def finds_rotations(self) -> bool:
        """Whether it learns rotations for the stage Blockwise, and leaves the original model as it is."""
        ...

    def check(self, scheme: Scheme, before: Sequence[Stage]) -> None:
        """Raises ValueError if it cannot fill ``scheme`` or follow the stages in ``before``."""
        ...


@serializable
@dataclass(frozen=True)
class Blockwise:
    """Runs steps on every block of the original model, one block after another, and leaves packed linears.

    Args:
        steps: in order. ``Solve``, which packs the block's linears, comes last and once.
        feed: the inputs that steps see: ``"quant"`` from the quantized blocks before, ``"fp"`` from the original ones.
        compute: the type of products while calibration text passes through the blocks; ``"auto"``: bfloat16 where the machine is
            clearly faster with it. The residual stream, statistics, solvers and what the result is measured on are in float32.

    Raises:
        ValueError: a value that is no step, a setting of the wrong type, no Solve, or a Solve that is not last.
    """

    steps: tuple[Any, ...]
    feed: Literal["fp", "quant"] = "quant"
    compute: Compute = "auto"

    def __post_init__(self):
        if self.compute not in get_args(Compute):
            raise ValueError(f"compute is one of {', '.join(get_args(Compute))}, found {self.compute!r}")
        for step in self.steps:
            if hasattr(type(step), "run"):  # first, because a step's needs may depend on a field of a wrong type
                check_types(step)
            if not isinstance(step, Step):
                raise ValueError(f"{step!r} is not a step such as Solve(...)")
        solves = [i for i, step in enumerate(self.steps) if Freedom.CODES in step.fixes]
        if solves != [len(self.steps) - 1]:
            names = [type(step).__name__ for step in self.steps]
            raise ValueError(f"Blockwise has one Solve, as its last step; found {names}")
        if len(ahead := sorted({step.looks_ahead for step in self.steps} - {0})) > 1:
            raise ValueError(f"steps that look ahead do so by one number of blocks, found {ahead}")

    @property
    def reads_inputs(self) -> bool:
        return any(step.reads_inputs for step in self.steps)

    @property
    def reads_original(self) -> bool:
        return self.feed == "fp" or any(step.reads_original or step.looks_ahead for step in self.steps)

    @property
    def looks_ahead(self) -> int:
        """The number of original blocks behind the one at hand that its steps run."""
        return max(step.looks_ahead for step in self.steps)

    @property
    def learns(self) -> bool:
        return any(step.learns for step in self.steps)

    @property
    def needs_fisher(self) -> bool:
        return any(Fisher() in step.needs for step in self.steps)

    @property
    def adapts(self) -> bool:
        return any(step.adapts for step in self.steps)

    @property
    def cache_parts(self) -> frozenset[str]:
        return frozenset[str]().union(*(step.cache_parts for step in self.steps))

    @property
    def of_cache(self) -> bool:
        return False

    @property
    def needs_latents(self) -> bool:
        return False

    @property
    def finds_rotations(self) -> bool:
        return False

    @property
    def reads_rotations(self) -> bool:
        """Whether its steps apply rotations that a stage before has learned."""
        return any(step.reads_rotations for step in self.steps)

    def check(self, scheme: Scheme, before: Sequence[Stage]) -> None:
        if late := [type(stage).__name__ for stage in before if not stage.finds_rotations]:
            raise ValueError(
                f"Blockwise quantizes the original model and comes first; found it after {', '.join(late)}"
            )
        if bool(before) != self.reads_rotations:
            readers = names_of([step for step in self.steps if step.reads_rotations])
            raise ValueError(
                f"{readers} applies learned rotations, and no stage before learns any; put Train(Rotations()) first"
                if readers
                else "a stage learns rotations, and no step of Blockwise applies them; add RotateResidual(learned=True) as the first "
                "step, or leave the stage out"
            )
        weights = [rule.weight for rule in scheme.rules if rule.weight is not None]
        if not weights:
            raise ValueError("no rule of the scheme has a weight format, so nothing would be quantized")
        activations = [rule.activation for rule in scheme.rules if rule.activation is not None]
        if self.cache_parts and scheme.attention is not None:
            learning = ", ".join(type(step).__name__ for step in self.steps if step.cache_parts)
            raise ValueError(
                f"{learning} reads a quantized cache, and the scheme quantizes attention's operands too, which is not simulated "
                "together: leave one of the two out"
            )
        check_combination(weights, activations, self.steps)
        check_attention_ranges(scheme.attention, self.steps)


@serializable
@dataclass(frozen=True)
class Train:
    """Trains parameters of a whole model: ``what`` is moved to minimize ``objective``.

    Without ``tokens`` it reads the calibration windows. With ``tokens`` it reads further windows of the same text, which no step
    and no measurement reads; where the text is too short, it reads what there is several times.

    Args:
        what: which parameters, how the model computes with them, and how they are stored.
        objective: the loss.
        epochs: passes over the calibration windows, in an order drawn from the recipe's seed; ``tokens`` replaces it.
        lr: largest learning rate of ``schedule``, in the units of ``what``.
        batch: windows that pass through the model at once.
        amp: run products in bfloat16 on processors that have instructions for it.
        optimizer: makes the steps.
        schedule: changes ``lr`` from step to step.
        tokens: the number of tokens to train on; 0: what is trained is stored as it starts. None: ``epochs`` counts.
        seq_len: tokens of a window of training text; None: as the calibration windows. It goes with ``tokens``.
        accumulate: batches in each step. This gives the step of a larger batch in the memory of a small one.
        clip_norm: largest norm of the gradient of all leaves; a larger gradient is scaled down to it. None: no limit.
        recompute: keep only the input of each block, and run blocks again in the backward pass. An objective of next tokens alone
            then computes logits for a few tokens at a time, too.
        measures: how often ``judge`` is measured, evenly, on windows that are not trained on, besides once at the start. The best
            state is kept. 0, or no such windows: the last state is kept. None: once, at the end, if that asks the original nothing
            that ``objective`` does not ask.
        patience: measurements without a new best after which training stops; 0: it does not stop early.
        cache: train and measure with the scheme's quantized cache, as if each token were decoded by itself.
        judge: what is measured on the windows that are not trained on, and decides which state is kept: ``"original"``, the KL
            divergence from the original, or ``"objective"``, the objective itself, for a model that is to become another one.
        top_k: keep only the original's so many likeliest tokens at each position, found once, instead of the original in memory;
            what that loses is measured and said. None: the original is asked each time.
    """

    what: Trainable
    objective: Objective
    epochs: int = 4
    lr: float = 2e-3
    batch: int = 2
    amp: bool = False
    optimizer: Optimizer = AdamW()
    schedule: Schedule = OneCycle()
    tokens: int | None = None
    seq_len: int | None = None
    accumulate: int = 1
    clip_norm: float | None = None
    recompute: bool = False
    measures: int | None = None
    patience: int = 0
    cache: bool = False
    judge: Literal["original", "objective"] = "original"
    top_k: int | None = None

    def __post_init__(self):
        check_types(self)  # first, because what a stage declares depends on its parts
        if self.epochs < 1 or self.batch < 1 or self.accumulate < 1 or not 0 < self.lr < inf:
            raise ValueError(
                f"training needs epochs, batch and accumulate of at least 1 and a positive lr, found epochs={self.epochs}, "
                f"batch={self.batch}, accumulate={self.accumulate}, lr={self.lr}"
            )
        if (self.tokens is not None and self.tokens < 0) or (self.seq_len is not None and self.seq_len < 2):
            raise ValueError(
                f"training reads 0 tokens or more in windows of at least 2, found tokens={self.tokens}, seq_len={self.seq_len}"
            )
        if self.seq_len is not None and self.tokens is None:
            raise ValueError("seq_len is of the windows that tokens asks for; give tokens, or leave seq_len out")
        if (self.measures or 0) < 0 or self.patience < 0 or (self.clip_norm is not None and not self.clip_norm > 0):
            raise ValueError(
                f"measures and patience are counts and clip_norm is positive or None, found measures={self.measures}, "
                f"patience={self.patience}, clip_norm={self.clip_norm}"
            )
        if self.top_k is not None and (self.top_k < 1 or self.objective.reads_hidden):
            raise ValueError(
                f"top_k keeps 1 likeliest token or more, and no hidden states; found top_k={self.top_k} and an objective that reads "
                f"{'hidden states' if self.objective.reads_hidden else 'logits'}"
            )
        if self.patience and not self.measures:
            raise ValueError("patience counts measurements on held-out windows; set measures too")

    def windows(self, seq_len: int) -> tuple[int, int]:
        """Windows of training text that it asks for, and tokens of each, where calibration windows have ``seq_len``."""
        length = self.seq_len or seq_len
        return -(-(self.tokens or 0) // length), length

    @property
    def measurements(self) -> int:
        """How often ``judge`` is measured besides at the start."""
        if self.measures is not None:
            return self.measures
        return int(self.objective.reads_original or self.judge == "objective")

    @property
    def compares(self) -> bool:
        """Whether it asks the original model anything: for its objective, or for what it measures."""
        judged = self.measurements > 0 and self.judge == "original"
        return self.tokens != 0 and (self.objective.reads_original or judged)

    @property
    def reads_inputs(self) -> bool:
        return True

    @property
    def reads_original(self) -> bool:
        """Whether the original's hidden states on the calibration windows are read; further text is read by a whole original."""
        return self.tokens is None and not self.finds_rotations

    @property
    def learns(self) -> bool:
        return True

    @property
    def adapts(self) -> bool:
        return False

    @property
    def needs_fisher(self) -> bool:
        return False

    @property
    def cache_parts(self) -> frozenset[str]:
        return frozenset()

    @property
    def of_cache(self) -> bool:
        return False

    @property
    def needs_latents(self) -> bool:
        return self.what.needs_latents

    @property
    def finds_rotations(self) -> bool:
        return self.what.finds_rotations

    def check(self, scheme: Scheme, before: Sequence[Stage]) -> None:
        name = type(self.what).__name__
        if self.what.finds_rotations and before:
            raise ValueError(f"Train({name}()) learns rotations of the original model: put it first")
        if self.what.finds_rotations != self.optimizer.rotates:
            raise ValueError(
                f"{type(self.optimizer).__name__} cannot move what {name} trains: rotations stay orthogonal under CayleySGD, and "
                "everything else is moved by AdamW"
            )
        if self.what.needs_packed and not any(not stage.finds_rotations for stage in before):
            raise ValueError(f"Train({name}()) trains what a packed model stores; put it after Blockwise, which packs")

        if self.what.needs_adapters and not any(stage.adapts for stage in before):
            raise ValueError(
                f"Train({name}()) trains low-rank terms, and no stage before it leaves any; give Solve an adapter, such as "
                "Solve(adapter=Adapter(rank=16)). In a mix the last method solves: name the base as an option of the one that trains"
            )
        if self.needs_latents and not isinstance(before[-1], Blockwise):
            raise ValueError(
                f"Train({name}()) starts from the weights that Blockwise rounded, and a stage between has changed what is stored; "
                "put it right after Blockwise"
            )
        if self.cache and scheme.attention is not None and scheme.cache:
            raise ValueError(
                "training cannot simulate a quantized cache and quantized operands of attention together; leave one out"
            )
        if self.cache and scheme.cache.calibrated:
            raise ValueError(
                "training cannot simulate a cache that needs a calibration; choose a format of the cache that needs none"
            )
        self.what.check([rule.weight for rule in scheme.rules if rule.weight is not None])


@serializable
@dataclass(frozen=True)
class FitCache:
    """Finds what the format of the cache leaves to calibration, in the queries, keys and values that the finished model
    computes from the calibration windows. Comes last.

    Args:
        fit: what is added up of each layer, and what follows from it.
    """

    fit: CacheFit

    @property
    def reads_inputs(self) -> bool:
        return False

    @property
    def reads_original(self) -> bool:
        return False

    @property
    def learns(self) -> bool:
        return False

    @property
    def adapts(self) -> bool:
        return False

    @property
    def needs_fisher(self) -> bool:
        return False

    @property
    def cache_parts(self) -> frozenset[str]:
        return self.fit.parts

    @property
    def of_cache(self) -> bool:
        return True

    @property
    def needs_latents(self) -> bool:
        return False

    @property
    def finds_rotations(self) -> bool:
        return False

    def check(self, scheme: Scheme, before: Sequence[Stage]) -> None:
        if not scheme.cache.calibrated & self.fit.parts:
            raise ValueError(
                f"FitCache({type(self.fit).__name__}()) finds {', '.join(sorted(self.fit.parts))}, and the format of the cache has "
                "none of them: leave the stage out"
            )
        for stage in before:
            if twice := stage.cache_parts & self.fit.parts & scheme.cache.calibrated:
                raise ValueError(
                    f"{type(stage).__name__} and FitCache both find {', '.join(sorted(twice))} of the cache; leave one out"
                )
