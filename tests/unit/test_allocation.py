"""Bits go where they lower the loss most, and the budget counts everything that is stored."""

from __future__ import annotations

import re
from itertools import product

import pytest
import torch
import yaml

import lowbit
from lowbit.allocation import error_by_width, spend
from lowbit.checkpoints import native
from lowbit.numerics import ClipSearch, Gram, Int, PerChannel, Spec
from lowbit.recipes import as_recipe, from_plain
from lowbit.solve import Gptq

from helpers import random_ids, tiny_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("models") / "llama")


IDS = random_ids(4, 16)


def test_the_greedy_allocation_of_convex_curves_is_the_best_that_there_is():
    generator = torch.Generator().manual_seed(0)
    scale = (3 * torch.randn(5, generator=generator)).exp().tolist()
    losses = {str(i): {b: s * 4.0**-b for b in (2, 3, 4, 5)} for i, s in enumerate(scale)}
    cost = {name: {b: 10.0 * b for b in (2, 3, 4, 5)} for name in losses}  # all of one size: nothing is left over
    chosen = spend(losses, cost, 10.0 * 17)
    assert sum(chosen.values()) == 17
    best = min(
        sum(losses[str(i)][b] for i, b in enumerate(widths))
        for widths in product((2, 3, 4, 5), repeat=5)
        if sum(widths) <= 17
    )
    assert sum(losses[name][b] for name, b in chosen.items()) == pytest.approx(best)


def test_what_costs_too_much_does_not_stop_smaller_layers_from_growing():
    losses = {"large": {2: 100.0, 3: 1.0}, "small": {2: 1.0, 3: 0.5}}
    cost = {"large": {2: 200.0, 3: 300.0}, "small": {2: 2.0, 3: 3.0}}
    assert spend(losses, cost, 205.0) == {"large": 2, "small": 3}


@pytest.mark.parametrize("method", ["gptq", "quip"])
def test_the_model_takes_what_was_asked_for_and_every_stored_bit_counts(llama, tmp_path, method):
    found = lowbit.allocate(llama, lowbit.recipe(method, bits=4), 5.0, IDS, widths=(2, 3, 4, 6, 8))
    assert found.bits_per_weight <= 5.0
    widths = {form.weight.grid.bits for form in found.formats.values()}
    assert len(widths) > 1
    report = lowbit.quantize(llama, found.recipe, IDS, out=tmp_path / "q", max_kl=1e9)
    assert report.bits_per_weight == pytest.approx(found.bits_per_weight, abs=1e-9)
    assert native.bits_per_weight(lowbit.load(tmp_path / "q")) == pytest.approx(found.bits_per_weight, abs=1e-9)


def test_an_insensitive_layer_gets_fewer_bits(llama, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e-3)  # hardly anything of it reaches the residual stream
    model.save_pretrained(tmp_path / "model")
    found = lowbit.allocate(tmp_path / "model", lowbit.recipe("rtn", group_size=None), 5.0, IDS)
    width = {name: form.weight.grid.bits for name, form in found.formats.items()}
    assert width["model.layers.1.mlp.down_proj"] == 2 < width["model.layers.0.mlp.down_proj"]
    assert found.loss < found.loss_before or found.bits_before < 5.0


def test_skipped_layers_stay_skipped_and_a_file_holds_the_same_recipe(llama, tmp_path):
    base = lowbit.recipe("rtn", group_size=16).with_overrides(
        [{"match": "v", "skip": True}, {"match": "o", "group_size": 8}]
    )
    found = lowbit.allocate(llama, base, 5.5, IDS)
    assert not any("v_proj" in name for name in found.formats)
    assert all(form.weight.granularity.size == (8 if "o_proj" in name else 16) for name, form in found.formats.items())
    path = tmp_path / "mixed.yaml"
    path.write_text(yaml.safe_dump(found.to_dict()))
    assert as_recipe(path) == found.recipe == from_plain(found.to_dict())


def test_layers_that_grow_do_not_keep_the_embedding_from_being_packed(llama):
    base = lowbit.recipe("rtn", bits=4, group_size=16)
    found = lowbit.allocate(llama, base, 5.5, IDS)
    assert max(found.by_width()) > 4 and base.scheme.chosen_outside.embedding is not None
    assert found.recipe.scheme.chosen_outside == base.scheme.chosen_outside


def test_the_ends_of_the_range_that_a_refusal_names_can_be_asked_for(llama):
    base = lowbit.recipe("rtn", group_size=48)
    with pytest.raises(ValueError, match="ask for") as refused:
        lowbit.allocate(llama, base, 99.0, IDS, widths=(2, 3))
    least, most = re.findall(r"takes (\S+) to (\S+),", str(refused.value))[0]
    for bits, width in ((least, 2), (most, 3)):
        found = lowbit.allocate(llama, base, float(bits), IDS, widths=(2, 3))
        assert found.by_width().keys() >= {width} and found.bits_per_weight == pytest.approx(float(bits), abs=0.002)


def test_one_width_is_one_budget_and_none_is_refused(llama):
    recipe, ids = lowbit.recipe("rtn", group_size=32), random_ids(4, 32)
    assert lowbit.allocate(llama, recipe, 4.625, ids, widths=[4]).bits_per_weight == 4.625
    with pytest.raises(
        ValueError, match=r"with codes of 4 bits this recipe takes 4\.625, everything stored counted: ask for 4\.625"
    ):
        lowbit.allocate(llama, recipe, 5, ids, widths=[4])
    with pytest.raises(ValueError, match="no widths to choose from: expected one at least"):
        lowbit.allocate(llama, recipe, 5, ids, widths=[])


def test_impossible_budgets_and_grids_without_widths_are_refused_before_any_work(llama):
    with pytest.raises(
        ValueError, match=r"2\.0 bits a weight were asked for; with codes of 2 to 8 bits this recipe takes 3"
    ):
        lowbit.allocate(llama, lowbit.recipe("rtn", group_size=16), 2.0, IDS)
    for bits in (99.0, float("nan")):
        with pytest.raises(
            ValueError, match=rf"{bits} bits a weight were asked for; .* to 4\.\d+, .* ask for 4\.\d+ at most"
        ):
            lowbit.allocate(llama, lowbit.recipe("rtn", group_size=None), bits, IDS, widths=(2, 4))
    with pytest.raises(ValueError, match="the recipe's weights are of the grid Table, which has one width"):
        lowbit.allocate(llama, lowbit.recipe("nf4"), 5.0, IDS)


@pytest.mark.parametrize("feed", ["fp", "quant"])
def test_every_block_is_judged_by_its_inputs_in_the_original_model(llama, tmp_path, feed):
    from lowbit.plan.model_plan import plan_model
    from lowbit.stages.blockwise import Walk
    from lowbit.stages.journal import Journal

    journal = Journal(tmp_path / "none", {})
    journal.open()
    walk = Walk(plan_model(llama, lowbit.recipe("gptq").with_blockwise(feed=feed)), IDS, journal, 2**30)
    with torch.no_grad():
        wanted = lowbit.load(llama)(input_ids=IDS, output_hidden_states=True).hidden_states
    for i, (state, fisher) in enumerate(walk.originals()):
        assert state.io is not None
        torch.testing.assert_close(state.io.x, wanted[i], rtol=1e-5, atol=1e-5)
        assert fisher.keys() == state.formats.keys()
    walk.close()


def test_errors_that_a_column_solver_hides_in_correlated_inputs_count_less():
    generator = torch.Generator().manual_seed(0)
    w, g = torch.randn(64, 64, generator=generator), torch.ones(64)
    x = torch.randn(512, 4, generator=generator) @ torch.randn(4, 64, generator=generator)  # four directions
    x = x + 0.05 * torch.randn(512, 64, generator=generator)
    correlated, apart = x.T @ x, torch.eye(64) * x.square().sum() / 64
    spec = Spec(Int(4), PerChannel())
    ratio = {}
    for method in ("rtn", "gptq"):
        recipe = lowbit.recipe(method, group_size=None)
        curves = [error_by_width(w, g, H, spec, recipe, [3, 4]) for H in (correlated, apart)]
        assert all(curve[4] < curve[3] / 3 for curve in curves)
        ratio[method] = curves[0][4] / curves[1][4]
    assert ratio["rtn"] == pytest.approx(1, rel=0.5)
    assert ratio["gptq"] < 0.1
    # The prediction is of the right size: what the solver really loses, over what is predicted for one gradient.
    solved = Gptq(ClipSearch(norm=2.0)).solve(w, spec, {Gram(): correlated}).q.dequantize() - w
    lost = 0.5 * torch.einsum("oi,ij,oj->", solved, correlated, solved).item()
    assert error_by_width(w, g, correlated, spec, lowbit.recipe("gptq"), [4])[4] == pytest.approx(lost, rel=0.5)
