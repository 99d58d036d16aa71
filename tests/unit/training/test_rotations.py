"""Learned rotations: what they leave as it is, what they lower, and that what was trained is what is stored."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import lowbit
from lowbit.checkpoints import native
from lowbit.checkpoints.description import ModelDescription
from lowbit.data import Calibration
from lowbit.modules import ResidualRotation, StoredRotation, residual_of
from lowbit.plan import plan
from lowbit.plan.model_plan import plan_model
from lowbit.recipes import Blockwise, Recipe, Train
from lowbit.scheme import activation, linears, weight
from lowbit.solve import Nearest
from lowbit.stages import descent
from lowbit.stages.blockwise import Walk
from lowbit.stages.journal import Journal
from lowbit.stages.rotations import BeforeWalk
from lowbit.steps import RotateInputs, RotateResidual, Solve
from lowbit.training import AdamW, CayleySGD, Cosine, Group, LatentWeights, LearnedRotations, NextToken, Rotations

from helpers import SOURCES, launched_twice, random_ids, sqnr_db, tiny_llama

QUIET = {"max_kl": 50.0, "allow_broken": True}
SMALL = {"tokens": 256, "batch": 2, "accumulate": 1, "measures": 2}
FOLDED = (RotateResidual(learned=True), RotateInputs("learned"))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("rotated") / "model", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def trained(place) -> Path:
    """Of a method with a cache; its weights are so fine that what is left is what the rotations do."""
    out = place.with_name("trained")
    recipe = lowbit.recipe("spinquant", bits=8, activation_bits=8, kv_bits=8, **SMALL)
    lowbit.quantize(place, recipe, text(), out=out, **QUIET)
    return out


def text() -> Calibration:
    ids = random_ids(6, 32)
    return Calibration(ids[:3], "a text", "0", held_out=ids[3:5], further=random_ids(8, 32, seed=3))


def rounding(bits: int, act: int | None, steps=FOLDED, **settings) -> Recipe:
    """Rotations trained with rounded weights, then the same rounding."""
    train = Train(Rotations(True), NextToken(), lr=1.5, optimizer=CayleySGD(), schedule=Cosine(), **settings)
    scheme = linears(weight(bits, None, symmetric=True), activation(act, symmetric=False))
    return Recipe("rotated", scheme, (train, Blockwise((*steps, Solve(Nearest())))))


def rotated(place, recipe: Recipe, what: Rotations):
    """An original model, and the parameters of its rotations."""
    setting = BeforeWalk(plan_model(place, recipe), random_ids(2, 16), 0, None)
    model = setting.model(()).requires_grad_(False)
    return model, what.parameters(model, setting.start(recipe.stages[0], {}))


def orthogonal(q: torch.Tensor) -> float:
    return float((q.double() @ q.double().mT - torch.eye(len(q), dtype=torch.float64)).abs().max())


def turn(leaves, seed: int) -> None:
    """Other rotations than those at the start, as a descent could find them."""
    with torch.no_grad():
        for i, leaf in enumerate(leaves):
            drawn = torch.randn(leaf.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + i))
            leaf.copy_(torch.linalg.qr(drawn)[0])


# The optimizer


def test_a_step_is_what_the_authors_iterate_to_and_leaves_a_rotation():
    """Their code holds a leaf whose transpose X moves, and repeats Y = X + a W (X + Y) / 2."""
    generator = torch.Generator().manual_seed(0)
    start = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=generator))[0]
    for size in (0.01, 10.0):  # the rate counts, then its bound
        leaf = nn.Parameter(start.clone())
        leaf.grad = torch.randn(12, 12, dtype=torch.float64, generator=generator) * size
        x, v = start.T, -leaf.grad.T
        w = v @ start - 0.5 * start.T @ (start @ (v @ start))
        w = w - w.T
        rate = min(0.5, 1 / float(w.abs().sum(0).max()))
        y = x + rate * v
        for _ in range(60):
            y = x + rate * w @ (0.5 * (x + y))
        CayleySGD().make([Group([leaf])], 0.5).step()
        torch.testing.assert_close(leaf.detach(), y.T, rtol=0, atol=1e-12)
        assert orthogonal(leaf.detach()) < 1e-13 and not torch.equal(leaf.detach(), start)


def test_steps_lower_a_loss_of_a_rotation_and_a_thousand_of_them_leave_it_orthogonal():
    generator = torch.Generator().manual_seed(1)
    wanted, leaf = (torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=generator))[0] for _ in range(2))
    wanted[0] *= torch.linalg.det(
        wanted @ leaf.T
    ).sign()  # steps do not leave the rotations that turn the same way round
    leaf = nn.Parameter(leaf)
    optimizer = CayleySGD().make([Group([leaf])], 0.3)
    losses = []
    for _ in range(1000):
        optimizer.zero_grad()
        loss = (leaf - wanted).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-6 * losses[0] and losses[1] < losses[0]
    assert orthogonal(leaf.detach()) < 1e-11


# Models


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "mixtral"])
def test_without_quantizers_rotations_leave_the_function_as_it_is(family, tmp_path):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 128,
    }
    more = {
        "llama": {"num_key_value_heads": 2},
        "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8},
        "mixtral": {"num_key_value_heads": 2, "num_local_experts": 3},
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 64},
    }[family]
    config = AutoConfig.for_model(family, **({"vocab_size": 128} if family == "gpt2" else sizes), **more)
    original = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in original.named_parameters():
            if "norm" in name or "ln_" in name:
                p.add_(0.3 * torch.randn_like(p))
    original.save_pretrained(tmp_path)
    model, parameters = rotated(tmp_path, rounding(8, None, tokens=32), Rotations())
    (group,) = parameters.groups
    fixed = family in ("gpt2", "gemma3_text")  # LayerNorms, and norms behind attention and MLP
    assert (parameters.residual is None) == fixed == bool(parameters.notes)
    assert len(group.leaves) == (2 if fixed else 3)
    ids = random_ids(2, 16, seed=4)
    with torch.no_grad():
        wanted = original(ids).logits
        for seed in (None, 5):
            if seed is not None:
                turn(group.leaves, seed)
            with parameters:
                torch.testing.assert_close(model(ids, use_cache=False).logits, wanted, rtol=1e-3, atol=1e-4)


def test_gradients_reach_every_rotation_and_blocks_that_run_again_give_the_same(place):
    model, parameters = rotated(place, rounding(4, 4, tokens=32), Rotations(True))
    ids, found = random_ids(2, 16, seed=4), []
    from lowbit.training import recomputed

    for again in (False, True):
        for leaf in parameters.groups[0].leaves:
            leaf.grad = None
        with parameters:
            if again:
                with recomputed(model.model.layers):
                    model(ids, use_cache=False).logits.square().mean().backward()
                assert "forward" in model.model.layers[0].__dict__
            else:
                model(ids, use_cache=False).logits.square().mean().backward()
        assert "forward" not in model.model.layers[0].__dict__
        found.append([leaf.grad for leaf in parameters.groups[0].leaves])
    assert len(found[0]) == 3 and all(g is not None and g.abs().max() > 0 for g in found[0])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_training_lowers_the_loss_on_text_it_never_saw_and_rotations_stay_orthogonal(place, tmp_path):
    recipe = lowbit.recipe("spinquant", bits=3, activation_bits=3, kv_bits=3, solver="nearest", distil=True, **SMALL)
    recipe = recipe.with_training(measures=4, tokens=1024)
    lowbit.quantize(place, recipe, text(), out=tmp_path / "out", **QUIET)
    course = [json.loads(line) for line in (tmp_path / "out" / "training-1.jsonl").read_text().splitlines()]
    measured = [row["held_out_loss"] for row in course if row["held_out_loss"] is not None]
    assert len(course) == 17 and min(measured) < 0.97 * measured[0]
    loaded = lowbit.load(tmp_path / "out", torch.float32)
    q = loaded.model.layers[0].lowbit_residual.rotation
    assert orthogonal(q) < 1e-5
    start = RotateResidual().residual_rotation(64, 0).forward(torch.eye(64, dtype=torch.float64))
    assert (q - start).abs().max() > 1e-3  # it moved


def test_what_was_trained_is_what_is_stored(place, tmp_path, monkeypatch):
    """The model in training, at the rotations that were kept, computes what the checkpoint does."""
    recipe, kept = rounding(4, 8, tokens=128, batch=2), []
    of = LearnedRotations.of
    monkeypatch.setattr(LearnedRotations, "of", lambda tensors: kept.append(of(tensors)) or kept[0])
    lowbit.quantize(place, recipe, text(), out=tmp_path / "out", **QUIET)
    model, parameters = rotated(place, recipe, Rotations(True))
    leaves = dict(zip(kept[0].tensors().values(), parameters.groups[0].leaves, strict=True))
    ids = random_ids(2, 16, seed=4)
    with torch.no_grad(), parameters:
        drawn = model(ids, use_cache=False).logits
        for value, leaf in leaves.items():
            leaf.copy_(value)
        simulated = model(ids, use_cache=False).logits
        stored = lowbit.load(tmp_path / "out", torch.float32)(ids).logits
    assert sqnr_db(simulated, stored) > 30 > 20 > sqnr_db(drawn, stored)


# Checkpoints


@torch.no_grad()
def test_a_checkpoint_computes_what_the_original_does_and_is_saved_again_as_it_was(place, trained, tmp_path):
    original, loaded = lowbit.load(place, torch.float32), native.load(trained, dtype=torch.float32)
    ids = random_ids(2, 24, seed=5)
    assert sqnr_db(original(ids).logits, loaded(ids, use_cache=False).logits) > 20
    assert residual_of(loaded) is not None and residual_of(loaded).rotation == StoredRotation(64)
    native.save(loaded, tmp_path / "again")
    again = native.load(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(loaded(ids).logits, again(ids).logits)
    assert ModelDescription.of(loaded) == again.config.quantization_config.description()
    assert ModelDescription.of(loaded).version == 8
    narrow = native.load(trained, dtype=torch.bfloat16)
    assert narrow.model.layers[0].lowbit_residual.rotation.dtype == torch.float32
    assert torch.equal(original.lm_head.weight, again.lm_head.weight)
    assert again.generate(ids[:1, :4], max_new_tokens=3, do_sample=False).shape == (1, 7)


def test_a_stored_matrix_that_is_no_rotation_is_refused(trained, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in trained.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(trained / "model.safetensors")
    state["model.layers.0.lowbit_residual.rotation"] *= 1.01
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lowbit_residual\.rotation is no rotation"):
        native.load(tmp_path)


def test_a_plan_foretells_the_matrix(place, trained):
    recipe = lowbit.recipe("spinquant", bits=8, activation_bits=8, kv_bits=8, **SMALL)
    foretold = plan(place, recipe)
    weights = sum(file.stat().st_size for file in trained.glob("*.safetensors"))
    assert abs(foretold.bytes_out - weights) < 0.05 * weights
    assert foretold.bytes_out > 64 * 64 * 4


def test_a_killed_training_ends_in_the_same_bytes(place, tmp_path, monkeypatch):
    monkeypatch.setattr(descent, "SAVE_SECONDS", 0.0)
    recipe = rounding(4, 4, tokens=256, batch=2, measures=2, judge="objective")

    def stop(done, total, what):
        if what.startswith("training, step 3 "):
            raise KeyboardInterrupt

    def stop_later(done, total, what):
        if done > 1.3 and what.startswith("block"):
            raise KeyboardInterrupt

    lowbit.quantize(place, recipe, text(), out=tmp_path / "whole", **QUIET)
    for each in (stop, stop_later):
        with pytest.raises(KeyboardInterrupt):
            lowbit.quantize(place, recipe, text(), out=tmp_path / "killed", progress=each, **QUIET)
    taken: list[str] = []
    lowbit.quantize(
        place, recipe, text(), out=tmp_path / "killed", progress=lambda done, total, what: taken.append(what), **QUIET
    )
    assert not any(what.startswith("training") for what in taken)
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert a == b


@pytest.mark.parametrize(
    "data",
    [
        {"type": "StoredRotation", "size": 64, "seed": 1, "blocks": "model.layers"},
        {"type": "StoredRotation", "blocks": "model.layers"},
        {"type": "StoredRotation", "size": 0, "blocks": "model.layers"},
        {"type": "StoredRotation", "size": "64", "blocks": "model.layers"},
        {"type": "RandomHadamard", "size": 64, "blocks": "model.layers"},
        {"type": "Rotate", "size": 64, "blocks": "model.layers"},
    ],
)
def test_a_description_of_no_rotation_is_refused(data):
    with pytest.raises(ValueError, match="rotation"):
        ResidualRotation.from_json(data)
    stored = ResidualRotation("model.layers", StoredRotation(64))
    assert ResidualRotation.from_json(stored.to_json()) == stored
    assert stored.tensor == "model.layers.0.lowbit_residual.rotation"


RUN = """
import sys
sys.path[:0] = {path!r}
import torch
torch.set_num_threads(1)
import lowbit
from unit.training.test_rotations import QUIET, rounding, text
lowbit.quantize({place!r}, rounding(4, 4, tokens=256, batch=1, accumulate=4, measures=2), text(), out={out!r}, **QUIET)
"""


@pytest.mark.slow
def test_two_processes_learn_the_rotations_of_one(place, tmp_path):
    recipe = rounding(4, 4, tokens=256, batch=4, measures=2)
    lowbit.quantize(place, recipe, text(), out=tmp_path / "one", **QUIET)
    done = launched_twice(tmp_path, RUN.format(path=SOURCES, place=str(place), out=str(tmp_path / "two")))
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (native.load(tmp_path / name, dtype=torch.float32) for name in ("one", "two"))
    a, b = (model.model.layers[0].lowbit_residual.rotation for model in (one, two))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


# What cannot be


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: replace(r, stages=r.stages[1:]), r"no stage before learns any; put Train\(Rotations\(\)\) first"),
        (lambda r: r.with_blockwise(steps=(Solve(Nearest()),)), "a stage learns rotations, and no step of Blockwise applies"),
        (lambda r: replace(r, stages=r.stages[::-1]), "no stage before learns any"),
        (lambda r: replace(r, stages=r.stages[:1]), "no stage Blockwise applies them"),
        (lambda r: r.with_training(optimizer=AdamW()), "AdamW cannot move what Rotations trains"),
        (lambda r: r.with_training(what=LatentWeights()), "CayleySGD cannot move what LatentWeights trains"),
    ],
)  # fmt: skip
def test_rotations_that_nothing_learns_or_applies_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        change(rounding(4, 4, tokens=32))


def test_a_mix_learns_rotations_first_and_trains_weights_behind_them(place, tmp_path):
    mixed = lowbit.recipe("spinquant+llm-qat", bits=4, activation_bits=8)
    kinds = [type(stage).__name__ for stage in mixed.stages]
    assert kinds == ["Train", "Blockwise", "Train"] and mixed.stages[0].finds_rotations
    with pytest.raises(ValueError, match="has no stage that trains a packed model"):
        lowbit.train(place, lowbit.recipe("spinquant"), text(), out=tmp_path / "out")


@pytest.mark.parametrize("residual", [True, False], ids=["both", "heads alone"])
def test_a_walk_without_what_was_learned_is_refused(residual, place, tmp_path):
    recipe = rounding(4, 4, FOLDED if residual else FOLDED[1:], tokens=32)
    walk = Walk(plan_model(place, recipe), random_ids(2, 16), Journal(tmp_path / "out", {}))
    with pytest.raises(ValueError, match="learns its rotations in a whole run alone; use lowbit quantize"):
        walk.run()
