"""Blocks solved on a Ray cluster, where a recipe's blocks do not depend on each other. Extra ``ray``.

A recipe whose steps read no text finds the codes of each block from its weights alone. Workers then do the steps of several blocks
at a time and send back what ``Solve`` found; the process that was started walks over the blocks as without Ray, packs what it gets,
and measures. So nothing but the time depends on the cluster, provided that its machines round alike.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from lowbit.checkpoints.source import open_model
from lowbit.modules import StoredRotation
from lowbit.plan.kept import KeepDtype
from lowbit.plan.model_plan import ModelPlan, lay_over
from lowbit.ray_cluster import RETRIES, check_fits, connected
from lowbit.recipes import Blockwise, Recipe
from lowbit.solve import Solution
from lowbit.stages.blockwise import block_state
from lowbit.stages.originals import Originals
from lowbit.steps.step import names_of
from lowbit.surroundings import own_settings

AHEAD = 2
"""Blocks that each processor of the cluster has in work or waiting: more would fill the memory of the process that packs them."""
_COPIES = 4
"""Float32 copies of a block's weights that a worker holds: the original, what it is folded to, and what a solver works on."""


def why_dependent(recipe: Recipe) -> str | None:
    """Why the blocks of a recipe cannot be solved apart from each other; None: they can."""
    stage = next((stage for stage in recipe.stages if isinstance(stage, Blockwise)), None)
    if stage is None:
        return "it has no stage that quantizes blocks"
    if stage.needs_fisher:
        return "it needs Fisher information, from a pass over the whole model"
    if any(each.finds_rotations for each in recipe.stages):
        return "it learns its rotations from text"
    reading = [step for step in stage.steps if step.reads_inputs or step.reads_original or step.looks_ahead]
    if reading:
        return f"{names_of(reading)} reads what the blocks before compute from the calibration text"
    return None


def _check(recipe: Recipe) -> None:
    if reason := why_dependent(recipe):
        raise ValueError(
            f"recipe {recipe.name!r} cannot be spread over Ray: {reason}, so its blocks come one after another. Leave --ray out, or use "
            "a method that reads no text, such as rtn, hqq or nf4"
        )


@dataclass(frozen=True)
class Request:
    """What a worker needs to know. ``model``: its local directory; ``threads``: torch's, as in the process that packs."""

    model: Path
    recipe: Recipe
    keep_dtype: KeepDtype
    trust_remote_code: bool
    threads: int


def solve_block(request: bytes, i: int) -> dict[str, Solution]:
    """Runs the steps of a pickled request on block i; returns the solution of each linear, by path in the block."""
    asked, plan = _opened(request)
    torch.set_num_threads(asked.threads)
    rotation = plan.rotation
    assert not isinstance(rotation, StoredRotation)  # such recipes are refused: text finds it
    with own_settings():
        originals = Originals(plan, plan.source.skeleton(unfuse=True))
        block = originals.load(i, rotation).requires_grad_(False)
        originals.narrow(i)
        state = block_state(plan, i, block, keeps_solutions=True)
        for step in plan.recipe.steps:
            step.run(state)
    return state.solutions


@lru_cache(1)
def _opened(request: bytes) -> tuple[Request, ModelPlan]:
    """The plan, made once in each worker."""
    asked: Request = pickle.loads(request)
    source = open_model(asked.model, trust_remote_code=asked.trust_remote_code)
    return asked, lay_over(source, asked.recipe, asked.keep_dtype)


@dataclass
class Spread:
    """Blocks in work on a cluster.

    Args:
        ray: the connected module.
        request: pickled.
        names: of the blocks.
        ahead: blocks in work or waiting at a time.
        threads, memory: what one block takes.
    """

    ray: Any
    request: bytes
    names: list[str]
    ahead: int
    threads: int
    memory: int
    _sent: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self):
        self._task = self.ray.remote(solve_block)

    def solutions(self, i: int) -> Mapping[str, Solution]:
        """What workers found for block i, by path, when it is there. Empty: they failed, or were lost each time; the walk then does
        the block itself, and meets the same error where there is one. Blocks behind it are sent."""
        for j in range(i, min(i + self.ahead, len(self.names))):
            if j not in self._sent:
                self._sent[j] = self._task.options(
                    num_cpus=self.threads, memory=self.memory, max_retries=RETRIES, name=self.names[j]
                ).remote(self.request, j)
        try:
            return self.ray.get(self._sent[i])
        except self.ray.exceptions.RayError:
            return {}
        finally:
            self._sent[i] = None  # frees what the cluster keeps of it


@contextmanager
def spread_over(address: str, plan: ModelPlan) -> Iterator[Spread]:
    """Blocks of a plan on a cluster, whose address is as for :func:`lowbit.ray_cluster.connected`.

    Raises:
        ValueError: a recipe whose blocks depend on each other, no Ray, no such cluster, or no machine that can hold a block.
    """
    _check(plan.recipe)
    source, threads = plan.source, torch.get_num_threads()
    asked = Request(source.path.resolve(), plan.recipe, plan.kept.choice, source.trust_remote_code, threads)
    memory = _COPIES * torch.float32.itemsize * max(block.weights for block in plan.blocks)
    with connected(address) as ray:
        check_fits(ray, "a block", threads, memory, "use fewer --threads, a larger machine, or leave --ray out")
        slots = max(1, int(ray.cluster_resources().get("CPU", 1)) // threads)
        yield Spread(ray, pickle.dumps(asked), [block.name for block in plan.blocks], AHEAD * slots, threads, memory)
