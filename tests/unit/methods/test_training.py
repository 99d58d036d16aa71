"""Methods that train whole models: what their papers promise, on tiny models, and that they run from end to end."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import lowbit
from lowbit.data import Calibration
from lowbit.linear_api import LoneLinear, lone_block
from lowbit.modules import LinearFormat
from lowbit.numerics import HALVES, NF3, Clipped, Gram, Int, Magnitude, MinMax, PerChannel, PerGroup, Spec, quantize
from lowbit.recipes import Train
from lowbit.stages.descent import Descent
from lowbit.steps import AllWeights, BlockIO, BlockMSE, BlockState, Learn, SearchClip, Solve, StepSizes
from lowbit.training import LatentWeights, NextToken, StoredFloats
from lowbit.training.objectives import Text

from helpers import random_ids, tiny_llama

QUIET = {"max_kl": 50.0, "allow_broken": True}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("trained") / "model")


def text() -> Calibration:
    ids = random_ids(8, 32)
    return Calibration(ids[:4], "a text", "0", held_out=ids[4:6], further=random_ids(24, 32, seed=3))


RUNS = {
    "llm-qat": {"bits": 4, "activation_bits": 8, "lr": 1e-3},
    "llm-qat at 2 bits": {"bits": 2, "activation_bits": 16, "lr": 1e-3},
    "llm-qat at 1 bit": {"bits": 1, "activation_bits": 16, "lr": 1e-3},
    "bitdistiller": {"bits": 2, "group_size": 32, "lr": 1e-3},
    "bitdistiller at 3 bits": {"bits": 3, "group_size": 32, "lr": 1e-3},
    "efficientqat": {"bits": 2, "group_size": 32, "weight_lr": 1e-3, "lr": 1e-2, "objective": "original"},
    "paretoq": {"bits": 2, "lr": 1e-3, "distil": True},
    "paretoq at 1 bit": {"bits": 1, "lr": 1e-3, "distil": True},
    "paretoq at 4 bits": {"bits": 4, "lr": 1e-3, "distil": True},
}


@pytest.mark.parametrize("name", RUNS)
def test_training_comes_closer_to_the_original_on_text_it_never_saw(name, place, tmp_path):
    options = {"tokens": 768, "batch": 2, "accumulate": 2, "measures": 4, **RUNS[name]}
    recipe = lowbit.recipe(name.split(" ")[0], **options)
    report = lowbit.quantize(place, recipe, text(), out=tmp_path / "out", **QUIET)
    assert report.coverage == 1.0
    course = [json.loads(line) for line in (tmp_path / "out" / "training-2.jsonl").read_text().splitlines()]
    measured = [row["held_out_kl"] for row in course if row["held_out_kl"] is not None]
    assert len(measured) == 5 and min(measured) < 0.97 * measured[0]
    # The report compares the checkpoint on the same windows, at some of their positions.
    assert report.kl == pytest.approx(min(measured), rel=0.2)
    loaded = lowbit.load(tmp_path / "out")
    assert loaded.generate(random_ids(1, 4), max_new_tokens=3, do_sample=False).shape == (1, 7)


@pytest.mark.parametrize("name", ["llm-qat", "bitdistiller", "efficientqat", "paretoq"])
def test_zero_tokens_are_what_the_method_starts_from(name, place, tmp_path):
    report = lowbit.quantize(place, lowbit.recipe(name, tokens=0), text(), out=tmp_path / "out", **QUIET)
    assert report.coverage == 1.0


def test_llm_qat_trains_with_the_cache_that_its_checkpoint_has(place, tmp_path):
    options = {"tokens": 768, "batch": 2, "accumulate": 2, "measures": 4, "lr": 1e-3, "kv_bits": 2}
    report = lowbit.quantize(place, lowbit.recipe("llm-qat", **options), text(), out=tmp_path / "with", **QUIET)
    course = [json.loads(line) for line in (tmp_path / "with" / "training-2.jsonl").read_text().splitlines()]
    start, least = course[0]["held_out_kl"], min(row["held_out_kl"] or torch.inf for row in course)
    plain = lowbit.quantize(
        place, lowbit.recipe("llm-qat", **options | {"kv_bits": 16}), text(), out=tmp_path / "plain", **QUIET
    )
    other = [json.loads(line) for line in (tmp_path / "plain" / "training-2.jsonl").read_text().splitlines()]
    assert start > 1.2 * other[0]["held_out_kl"] and least < 0.97 * start
    assert report.cache_bits is not None and plain.cache_bits is None
    recipe = lowbit.recipe("llm-qat", kv_bits=4)
    assert recipe.scheme.kv is not None and recipe.scheme.kv.before_rope and recipe.stages[-1].cache
    with pytest.raises(ValueError, match="leave one out"):
        lowbit.recipes.mix("both", [recipe, lowbit.recipe("smoothquant", attention_bits=8)])


def test_quantizers_of_llm_qat_are_those_of_its_code():
    """w_bits of 3 and more, 2 and 1, as sections of the published code define them."""
    w = torch.randn(8, 40, generator=torch.Generator().manual_seed(0))

    def restored(bits: int) -> torch.Tensor:
        recipe = lowbit.recipe("llm-qat", bits=bits)
        spec, solve = recipe.scheme.rules[0].weight, recipe.steps[-1]
        assert spec is not None
        return quantize(w, Spec(spec.grid, spec.granularity, scale_dtype="float32"), solve.solver.fit).dequantize()

    scale = 7 / w.abs().amax(1, keepdim=True)
    torch.testing.assert_close(restored(4), (w * scale).round() / scale, rtol=1e-5, atol=1e-6)
    c = 2 * w.abs().mean(1, keepdim=True)
    two = c * ((w / c).clamp(-0.99, 0.99).mul(2).sub(0.5).round() + 0.5) / 2
    torch.testing.assert_close(restored(2), two, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(restored(1), w.sign() * w.abs().mean(1, keepdim=True), rtol=1e-5, atol=1e-6)
    for bits in (4, 2, 1):  # odd
        assert torch.equal(restored(bits).unique().abs().unique(), restored(bits).abs().unique())


def test_quantizers_of_paretoq_are_those_of_its_code():
    w = torch.randn(8, 40, generator=torch.Generator().manual_seed(0))
    largest = w.abs().amax(1, keepdim=True)
    two = largest * ((w / largest).clamp(-0.99, 0.99).mul(2).sub(0.5).round() + 0.5) / 2
    spec = Spec(HALVES, PerChannel(), scale_dtype="float32")
    torch.testing.assert_close(quantize(w, spec, Magnitude("largest", 0.75)).dequantize(), two, rtol=1e-5, atol=1e-6)
    step = largest / 7
    four = (w / step).round().clamp(-8, 7) * step
    spec = Spec(Int(4, symmetric=True), PerChannel(), scale_dtype="float32")
    torch.testing.assert_close(quantize(w, spec, MinMax()).dequantize(), four, rtol=1e-5, atol=1e-6)


def _state(spec: Spec, w: torch.Tensor | None = None) -> BlockState:
    torch.manual_seed(0)
    linear = torch.nn.Linear(32, 24, bias=False).requires_grad_(False)
    if w is not None:
        linear.weight.copy_(w)
    x = torch.randn(8, 16, 32) @ torch.randn(32, 32)
    block = LoneLinear(linear)
    y = torch.cat([block(window[None]) for window in x])
    return BlockState.of(
        "", block, lone_block(linear), {"linear": LinearFormat(spec)}, BlockIO(x, y, lambda run, window: run(window))
    )


@pytest.mark.parametrize("grid", [Int(2), NF3], ids=str)
def test_ends_that_shrink_apart_lose_no_more_than_ends_that_shrink_together(grid):
    spec, skewed = Spec(grid, PerGroup(16), scale_dtype="float32"), torch.rand(24, 32) ** 4 - 0.05

    def lost(step: SearchClip) -> float:
        state = _state(spec, skewed)
        step.run(state)
        draft, gram = state.draft("linear"), state.stats_of(state.collect({Gram()}), "linear")[Gram()]
        error = quantize(draft.weight, spec, draft.range_shares or MinMax()).dequantize() - draft.weight
        return sum(
            float(((error[:, s : s + 16] @ gram[s : s + 16, s : s + 16]) * error[:, s : s + 16]).sum()) for s in (0, 16)
        )

    none, apart = lost(SearchClip(max_shrink=0.01)), lost(SearchClip(apart=True))
    one_end = Clipped(torch.ones(48), torch.full((48,), 0.75))
    assert apart <= none and apart <= lost(SearchClip(max_shrink=0.05, apart=True))
    state = _state(spec, skewed)
    SearchClip(apart=True).run(state)
    found = state.draft("linear").range_shares
    assert isinstance(found, Clipped) and not torch.equal(found.lo_share_G1, found.hi_share_G1)
    assert {round(20 * float(share)) for share in found.hi_share_G1.unique()} <= set(range(11, 21)), one_end


def test_step_sizes_and_weights_learned_together_beat_either_alone():
    spec = Spec(Int(2), PerGroup(16), scale_dtype="float32")

    def loss(*makers) -> float:
        state = _state(spec)
        if makers:
            Learn(makers, BlockMSE(), epochs=20, batch=2, verify=True).run(state)
        Solve().run(state)
        assert state.io is not None and state.io.y is not None
        found = torch.cat([state.block(window[None]) for window in state.io.x])
        return (found - state.io.y).square().mean().item()

    weights, steps = AllWeights(3e-3), StepSizes(1e-2)
    start, together = loss(), loss(weights, steps)
    assert together < loss(weights) < start and together < loss(steps) < start


def test_what_is_learned_with_step_sizes_is_what_is_stored():
    """Learning runs drafts simulated with the ranges that it commits."""
    state = _state(Spec(NF3, PerGroup(16)))
    Learn((AllWeights(3e-3), StepSizes(1e-2)), BlockMSE(), epochs=3).run(state)
    draft = state.draft("linear")
    assert state.io is not None
    with draft.simulated(), torch.no_grad():
        wanted = draft(state.io.x)
    Solve().run(state)
    assert torch.equal(state.block(state.io.x), wanted)


def test_the_scale_of_nvfp4_s_scales_is_trained(place, tmp_path):
    """The scales of its groups are codes, which stay."""
    recipe = lowbit.recipe("efficientqat+nvfp4", epochs=1, tokens=256, accumulate=1, measures=0)
    lowbit.quantize(place, replace(recipe, stages=recipe.stages[:-1]), text(), out=tmp_path / "start", **QUIET)
    report = lowbit.quantize(place, recipe, text(), out=tmp_path / "out", **QUIET)
    assert not any("nothing was trained" in note for note in report.warnings)
    name = "model.layers.0.mlp.up_proj"
    before, after = (lowbit.load(tmp_path / run).get_submodule(name).qtensor() for run in ("start", "out"))
    inner, moved = before.second["scale"], after.second["scale"]
    assert torch.equal(after.codes, before.codes) and torch.equal(moved.codes, inner.codes)
    assert not torch.equal(moved.params.scale, inner.params.scale)


def test_a_stage_that_finds_nothing_to_train_says_so():
    stage = Train(StoredFloats(gains=False), NextToken(), tokens=64)
    windows = Text(random_ids(4, 32), lambda index: pytest.fail("nothing asks the original"))
    notes = Descent(torch.nn.Sequential(torch.nn.Linear(4, 4)), stage, windows).run()
    assert any("nothing was trained" in note for note in notes)


def test_training_methods_train_what_their_papers_train():
    stages = {name: lowbit.recipe(name).stages[-1] for name in ("llm-qat", "bitdistiller", "efficientqat", "paretoq")}
    assert all(isinstance(stage, Train) for stage in stages.values())
    assert stages["bitdistiller"].what == LatentWeights()
    assert stages["paretoq"].what.ranges is None and stages["llm-qat"].what.limit == 2.0
    assert lowbit.recipe("llm-qat", mask=False).stages[-1].what.limit is None
    assert not stages["efficientqat"].what.gains
    with pytest.raises(ValueError, match="a lone linear is in none"):
        lowbit.quantize_linear(torch.nn.Linear(8, 8), torch.randn(4, 8), lowbit.recipe("paretoq"))
