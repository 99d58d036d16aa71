"""Law: a plan's bytes are those of the finished checkpoint, for every method on every family of architectures.

If a search or a solver decides how much is stored (outliers, copied channels), the test says what the plan counts.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, MixtralConfig, OPTConfig

from lowbit.checkpoints.shards import TensorHeader, read_shard_header
from lowbit.plan import explain, plan
from lowbit.plan.model_plan import ModelPlan, plan_model
from lowbit.recipes import METHODS, Recipe, recipe
from lowbit.stages.blockwise import Walk
from lowbit.stages.journal import Journal
from lowbit.stages.rest import Rest
from lowbit.stages.rotations import BeforeWalk
from lowbit.stages.run import Run
from lowbit.training import LearnedRotations

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "gpt2": GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "opt": OPTConfig(
        vocab_size=96,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    ),
    "gemma3": Gemma3TextConfig(
        **SIZES, head_dim=16, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
    ),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=2),
}
QUICK = {"llama", "gpt2"}
RECIPES = {name: recipe(name) for name in METHODS} | {
    "quip-balance": recipe("quip", balance=True),
    "rptq-attention": recipe("rptq", attention_bits=8),
    "awq+quip": recipe("awq+quip", clip=False, grid=2),
    "quarot+gptq": recipe("quarot+gptq", group_size=16, act_order=True),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny random models by name, made on first use."""
    root = tmp_path_factory.mktemp("models")

    def get(name: str) -> Path:
        if not (root / name).exists():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.bfloat16).save_pretrained(root / name)
        return root / name

    return get


def quick(wanted: Recipe) -> Recipe:
    """The recipe without learning and without a search for channels to copy."""
    changes = {
        "Learn": {"epochs": 0, "steps": None},
        "SearchReassembly": {"ratio": 0.0},
        "SearchFloat": {"rounds": 1, "grid": 2, "tokens": 32},
    }
    return wanted.with_blockwise(
        steps=tuple(replace(step, **changes.get(type(step).__name__, {})) for step in wanted.steps)
    )


def untrained(planned: ModelPlan, ids: torch.Tensor | None) -> LearnedRotations | None:
    """The rotations with which a stage starts that learns some; None: no stage does."""
    stage = planned.recipe.stages[0]
    if not stage.finds_rotations or ids is None:
        return None
    before = BeforeWalk(planned, ids, 0, None)
    return stage.what.parameters(before.model(()), before.start(stage, {})).learned()


def written(planned: ModelPlan, out: Path) -> dict[str, TensorHeader]:
    """The headers of every tensor that a run writes, by name."""
    journal = Journal(out, {})
    journal.open()
    ids = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))
    ids = ids if planned.recipe.needs_calibration else None
    if planned.recipe.changes_weights:
        walk = Walk(planned, ids, journal, learned=untrained(planned, ids))
        walk.run()
        Rest(walk).write()
        walk.close()
    else:
        running = Run(planned, ids, journal)
        running.stages()
        running.close()
    files = (journal.directory / entry["file"] for entry in journal.finished)
    return {name: header for file in files for name, header in read_shard_header(file).items()}


@pytest.mark.parametrize("method", RECIPES)
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]
)
def test_planned_bytes_are_those_of_the_finished_checkpoint(models, tmp_path, name, method):
    wanted = quick(RECIPES[method])
    planned = plan_model(models(name), wanted)
    keeps_outliers = any(layer.outliers for *_, layer in planned.layers)
    headers = written(planned, tmp_path / "out")
    stored = {
        tensor: header.nbytes
        for tensor, header in headers.items()
        if not (keeps_outliers and re.search(r"\.side\d+_\w+$", tensor))
    }
    assert plan(models(name), wanted).bytes_out == sum(stored.values())


@pytest.mark.parametrize("assembly", ["merge", "prune", "none"])
def test_copied_channels_are_counted_at_their_most(models, tmp_path, assembly):
    wanted = recipe("qllm", assembly=assembly, epochs=0, threshold_steps=2)
    told = plan(models("llama"), wanted)
    assert told.bytes_out >= sum(
        header.nbytes for header in written(plan_model(models("llama"), wanted), tmp_path).values()
    )
    assert any("the most that it may choose" in warning for warning in told.warnings)


def test_a_transform_that_linears_run_is_counted_and_explained_where_no_edge_carries_it(models):
    wanted = recipe("quip", balance=True)
    names = _first_transforms(plan_model(models("gpt2"), wanted))
    assert names["mlp.c_proj"] == "Scale" and names["mlp.c_fc"] != "Scale"
    explanation = explain(wanted, models("gpt2"))
    assert "is run and stored by the linears that read" in explanation.steps[0]
    assert not [note for note in explanation.notes if "is not applied" in note]


def _first_transforms(planned: ModelPlan) -> dict[str, str]:
    """The type of the first transform that each linear of the first block runs on its input."""
    return {path: layer.pre[0].type for path, layer in planned.blocks[0].layers.items() if layer.pre}
