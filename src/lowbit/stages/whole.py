"""A whole model as a run's shards: written as it is, where nothing but its cache is quantized, and read back."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowbit.checkpoints import native
from lowbit.checkpoints.description import ModelDescription
from lowbit.checkpoints.shards import read_shard_header, read_tensor
from lowbit.checkpoints.source import ModelSource
from lowbit.decoding.packed_cache import key_biases, rules_for_biases
from lowbit.modules import KVFormats
from lowbit.numerics import narrowed
from lowbit.plan.model_plan import ModelPlan
from lowbit.progress import Progress
from lowbit.stages.journal import Section
from lowbit.stages.stream import outside


def write_as_it_is(plan: ModelPlan, section: Section, progress: Progress) -> None:
    """Writes every tensor of the original in its own dtype: a shard for each block, and one for what is outside of them."""
    source, blocks = plan.source, [block.name for block in plan.blocks]
    model = source.skeleton()
    tied, total = set(model.all_tied_weights_keys), len(blocks) + 1
    for i, entry in enumerate(section.finished):
        if entry["file"] != section.unit_name(i, total):
            section.forget(i)  # the journal was damaged
            break
    for i in range(len(section.finished), total):
        if i < len(blocks):
            names = [f"{blocks[i]}.{key}" for key in model.get_submodule(blocks[i]).state_dict()]
        else:
            names = outside(model, plan.architecture)
        names = [name for name in names if name not in tied]
        source.load(model, names, dtype=None)
        state = model.state_dict()
        kept = {name: narrowed(name, state[name], plan.kept.dtype_of(name)) for name in names}
        section.write(section.unit_name(i, total), kept, {})
        source.release_tensors(model, names)
        progress(i + 1, total, "writing")


def read_back(plan: ModelPlan, section: Section, description: ModelDescription, shards: list[str]) -> PreTrainedModel:
    """The model that ``shards`` in the run's directory make, packed, everything else in float32."""
    native.write_checkpoint(section.directory, plan.source.config, description, shards, plan.kept.dtype)
    trust = plan.source.trust_remote_code
    return native.load(section.directory, dtype=torch.float32, unfinished=True, trust_remote_code=trust)


def fitted_cache(source: ModelSource, section: Section, formats: KVFormats) -> KVFormats:
    """``formats`` with rules for the layers whose key biases, as the run's shards have them, are large."""
    if not formats:
        return formats
    headers = {}
    for file in section.files:
        headers |= read_shard_header(section.directory / file)
    named = key_biases(source.config)
    biases: dict[int, Tensor | None] = {i: read_tensor(headers[name]) for i, name in named.items() if name in headers}
    rules = rules_for_biases(source.config, biases, formats.kv, formats.overrides)
    return KVFormats(formats.kv, (*formats.overrides, *rules))
