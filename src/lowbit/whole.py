"""Steps of model scope in a run: the packed model is loaded once, whole, changed, and written again.

Where a recipe has such steps the walk writes its shards under names of their own. The model that they make is loaded, the
steps run on it, and each shard is written again, under its final name, as a unit of the same journal. Steps are not
resumed in their middle: a run that was killed there does them again, from the same bytes with the same seed, so that the
result cannot differ. The alternative, to change shards in place, could not tell a finished one from a torn one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit.checkpoints import native
from lowbit.checkpoints.shards import read_shard_header
from lowbit.progress import Progress
from lowbit.stages.blockwise import Walk, shard_name
from lowbit.stages.journal import Journal
from lowbit.steps import ModelState


def run_model_steps(walk: Walk, journal: Journal, progress: Progress | None) -> tuple[nn.Module, list[str]]:
    """Runs them and returns the model as its final shards make it (float32, packed), and what there is to report.

    The walk must have written everything; its own shards are removed.
    """
    total = walk.total + 1
    final = [shard_name(i, total) for i in range(total)]
    walked = [shard_name(i, total, final=False) for i in range(total)]
    if len(journal.finished) < 2 * total:
        model = _load(walk, journal, walked)
        notes = _run(walk, model, progress)
        state = model.state_dict()
        for i in range(len(journal.finished) - total, total):
            headers = read_shard_header(journal.directory / walked[i])
            journal.write(final[i], {name: state[name].to(h.dtype) for name, h in headers.items()}, {"notes": notes})
    return _load(walk, journal, final), journal.finished[total]["record"]["notes"]


def _load(walk: Walk, journal: Journal, shards: list[str]) -> nn.Module:
    native.write_checkpoint(journal.directory, walk.source.config, walk.description, shards, walk.source.dtype)
    return native.load(journal.directory, dtype=torch.float32, unfinished=True)


def _run(walk: Walk, model: nn.Module, progress: Progress | None) -> list[str]:
    ids, stream, steps = walk.ids, walk.stream, walk.recipe.model_steps
    assert ids is not None and stream is not None
    done, expected = 0, sum(step.model_ticks(len(ids)) for step in steps)

    def tick(what: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(min(done, expected), expected, what)

    def original(i: int) -> Tensor:
        return walk.logits_of(ids[i : i + 1], walk.store["fp"][i : i + 1])

    with stream.loaded_outside(walk.source):
        state = ModelState(model, ids, original, walk.recipe.seed, tick)
        for step in steps:
            step.run_model(state)
    return state.notes


__all__ = ["run_model_steps"]
