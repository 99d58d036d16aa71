"""LLM.int8(): what its paper and its library promise of channels taken out at run time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import lowbit
from lowbit.kernels import outlier_channels
from lowbit.modules import ActSpec, QuantLinear, fake_activation, fake_quantize_activation, quantize_activation
from lowbit.numerics import NF4, Int, KeptColumns, PerChannel, PerGroup, PerTensor, PerToken, Spec
from lowbit.scheme import activation, linears
from lowbit.solve import Gptq, Nearest, ReachingColumns
from lowbit.steps import Search, Set, SmoothPowers

from helpers import random_ids, sqnr_db, tiny_llama
from pairwise import cases

O, I, LOUD = 48, 96, (3, 50)
ACT = ActSpec(Spec(Int(8, symmetric=True), PerToken(), scale_dtype="float32"), threshold=6.0)


@pytest.fixture(scope="module")
def linear():
    torch.manual_seed(0)
    return nn.Linear(I, O).requires_grad_(False)


@pytest.fixture(scope="module")
def x():
    """Tokens ``[T, I]`` of unit size. Two channels reach ten times that, one of them in a single token."""
    x = torch.randn(40, I, generator=torch.Generator().manual_seed(1)).clamp(-4, 4)
    x[:, LOUD[0]] *= 30
    x[7, LOUD[1]] = 25.0
    return x


def quantized(linear, x=None, **options) -> QuantLinear:
    return lowbit.quantize_linear(linear, x, lowbit.recipe("llm-int8", **options))


def test_the_channels_taken_out_are_those_that_any_token_of_the_call_lifts_over_the_threshold(x):
    assert outlier_channels(x, 6.0).tolist() == list(LOUD)
    assert outlier_channels(x[8:].view(2, 16, I), 6.0).tolist() == [LOUD[0]]
    assert outlier_channels(torch.full((1, 3), 6.0), 6.0).tolist() == [0, 1, 2]  # at the threshold counts as over it
    assert outlier_channels(x, 0.0).tolist() == []


def test_codes_of_the_channels_taken_out_are_those_of_zero_and_no_others_mind_how_large_they_are(x):
    x = x.clone()
    x[:, LOUD] = 0
    x[3, LOUD[0]] = 7.0
    codes, params = quantize_activation(x, ACT)
    assert (codes[:, LOUD[0]] == 128).all()
    louder = x.clone()
    louder[:, LOUD[0]] += 1e3
    codes_louder, params_louder = quantize_activation(louder, ACT)
    assert torch.equal(codes, codes_louder) and torch.equal(params.scale, params_louder.scale)


def test_small_values_of_a_channel_that_is_taken_out_still_count_in_their_tokens_range():
    x = torch.tensor([[1.0, 5.0, 0.5], [1.0, 8.0, 0.5]])
    _, params = quantize_activation(x, ACT)
    torch.testing.assert_close(params.scale[:, 0] * 127, torch.tensor([5.0, 1.0]))


def test_threshold_0_and_infinity_take_nothing_out(linear, x):
    plain = lowbit.quantize_linear(
        linear, None, lowbit.recipe("rtn", bits=8, group_size=None, symmetric=True, activation_bits=8)
    )
    for threshold in (0.0, float("inf")):
        q = quantized(linear, threshold=threshold)
        assert torch.equal(q(x), plain(x)) and q.description == plain.description


def test_a_tiny_threshold_multiplies_every_channel_in_floating_point(linear, x):
    decoded = quantized(linear, threshold=1e-9)
    assert sqnr_db(x @ decoded.dequantize().T + linear.bias, decoded(x)) > 120
    original = quantized(linear, x, threshold=1e-9, outlier_weight="original")
    assert sqnr_db(linear(x), original(x)) > 65  # the weight in float16
    assert sqnr_db(linear(x), decoded(x)) < 50


def test_taking_outliers_out_pays_and_the_original_weight_beats_its_decoded_integers(linear, x):
    wanted = linear(x)
    vectorwise, decoded = (sqnr_db(wanted, quantized(linear, threshold=t)(x)) for t in (0.0, 6.0))
    original = sqnr_db(wanted, quantized(linear, x, outlier_weight="original")(x))
    assert decoded > vectorwise + 6
    assert original > decoded + 3  # more than half of what remains is the rounded weight of the loud channels


def test_stored_bits_are_eight_and_a_scale_a_row_and_count_every_original_column(linear, x):
    q = quantized(linear)
    assert q.bits_per_weight == pytest.approx(8 + 16 / I)
    original = quantized(linear, x, outlier_weight="original")
    (kept,) = original.side_terms
    assert isinstance(kept, KeptColumns) and kept.index.tolist() == list(LOUD)
    assert original.bits_per_weight == pytest.approx(8 + 16 / I + len(LOUD) * (16 / I + 32 / (O * I)))
    everything = quantized(linear, x, outlier_weight="original", threshold=1e-9)
    assert everything.bits_per_weight == pytest.approx(24 + 16 / I + 32 / O)


def test_the_default_needs_no_data_and_original_columns_do(linear):
    assert not lowbit.recipe("llm-int8").needs_calibration
    assert lowbit.recipe("llm-int8", outlier_weight="original").needs_calibration
    with pytest.raises(ValueError, match="calibrates on inputs"):
        quantized(linear, outlier_weight="original")


def test_an_outlier_that_calibration_has_not_seen_multiplies_the_decoded_integers(linear, x):
    quiet = x.clone()
    quiet[7, LOUD[1]] = 1.0
    q = quantized(linear, quiet, outlier_weight="original")
    (kept,) = q.side_terms
    assert kept.index.tolist() == [LOUD[0]]
    alone = torch.zeros(1, I)
    alone[0, LOUD[1]] = 25.0
    torch.testing.assert_close(q(alone), 25 * q.dequantize()[:, LOUD[1]][None] + linear.bias)


def test_permuted_channels_give_the_same_output(linear, x):
    order = torch.randperm(I, generator=torch.Generator().manual_seed(2))
    moved = nn.Linear(I, O)
    moved.load_state_dict({"weight": linear.weight[:, order], "bias": linear.bias})
    assert sqnr_db(quantized(linear)(x), quantized(moved)(x[:, order])) > 110


def test_a_sequence_gives_other_numbers_beside_one_with_other_outliers(linear, x):
    q = quantized(linear)
    calm, loud = x[20:24], x[4:8]
    assert torch.equal(q(torch.cat([calm, x[24:28]]))[:4], q(calm))
    assert not torch.equal(q(torch.cat([calm, loud]))[:4], q(calm))


@pytest.mark.parametrize("prepared", [False, True])
def test_tokens_of_zeros_of_nothing_but_outliers_and_no_tokens_at_all_run(linear, prepared):
    q = quantized(linear)
    if prepared:
        q.prepare()
    x = torch.zeros(3, I)
    x[1] = 9.0
    y = q(x)
    assert torch.equal(y[0], linear.bias) and torch.isfinite(y).all()
    torch.testing.assert_close(y[1], 9 * q.dequantize().sum(1) + linear.bias, rtol=1e-4, atol=1e-4)
    assert q(torch.zeros(0, I)).shape == (0, O)


@pytest.mark.parametrize("prepared", [False, True])
def test_nan_and_infinity_reach_the_output_of_their_token_only(linear, x, prepared):
    q = quantized(linear)
    if prepared:
        q.prepare()
    broken = x.clone()
    broken[2, 11], broken[5, 12] = torch.nan, torch.inf
    y = q(broken)
    assert y[2].isnan().all() and not torch.isfinite(y[5]).any()
    assert torch.isfinite(y[[0, 1, 3, 4, *range(6, 40)]]).all()


@pytest.mark.parametrize(
    ("symmetric", "granularity", "weight", "rows"),
    cases(
        [True, False],
        [PerToken(), PerTensor()],
        [Spec(Int(8, symmetric=True), PerChannel()), Spec(Int(4), PerGroup(32)), Spec(NF4, PerGroup(32))],
        [1, 2, 3, 40],
    ),
    ids=str,
)
def test_compiled_kernels_take_channels_out_as_the_reference_does(
    linear, x, weight, granularity, symmetric, rows, monkeypatch
):
    act = ActSpec(Spec(Int(8, symmetric=symmetric), granularity, scale_dtype="float32"), threshold=6.0)
    recipe = replace(lowbit.recipe("rtn"), scheme=linears(weight, act))
    q = lowbit.quantize_linear(linear, None, recipe)
    monkeypatch.setenv("LOWBIT_KERNELS", "reference")
    wanted = q(x[:rows])
    monkeypatch.delenv("LOWBIT_KERNELS")
    first = next(reason.kernel for reason in q.explain(rows) if reason.why_not is None)
    assert first == ("int8_torch" if weight.granularity == PerChannel() else "reference")
    assert sqnr_db(wanted, q(x[:rows])) > 100
    assert q.prepare() is None
    for name in lowbit.kernels.native.instruction_sets():
        monkeypatch.setenv("LOWBIT_KERNELS", name)
        assert sqnr_db(wanted, q(x[:rows])) > 100, name


def test_half_precision_inputs_lose_what_half_precision_loses(linear, x):
    q = quantized(linear)
    q.prepare()
    assert sqnr_db(q(x), q(x.half()).float()) > 45


def test_what_searches_and_learning_see_is_what_runs(x):
    for granularity in (PerToken(), PerTensor()):
        act = ActSpec(Spec(Int(8), granularity, scale_dtype="float32"), threshold=6.0)
        assert torch.equal(fake_activation(x, act, None), fake_quantize_activation(x, act))
        half = x.bfloat16()  # for products in bfloat16; the rounding itself is not
        assert torch.equal(fake_activation(half, act, None), fake_quantize_activation(half, act).bfloat16())
    inputs = x.clone().requires_grad_()
    fake_activation(inputs, ACT, None).sum().backward()
    assert inputs.grad is not None and torch.isfinite(inputs.grad).all()
    assert (inputs.grad[x.abs() >= 6.0] == 1).all()  # they are in no range


def test_formats_with_a_threshold_are_plain_data_and_those_that_cannot_have_one_are_refused():
    assert lowbit.numerics.from_dict(lowbit.numerics.to_dict(ACT)) == ACT
    assert "threshold" not in lowbit.numerics.to_dict(activation(8))  # as in checkpoints without one
    for threshold in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="threshold of outlier channels is a magnitude"):
            activation(8, threshold=threshold)
    with pytest.raises(ValueError, match="measured with its outliers in it"):
        activation(8, per="tensor", static=True, threshold=6.0)
    with pytest.raises(ValueError, match="a threshold for columns is above 0"):
        ReachingColumns(0.0)


# Mixes


def test_a_mix_with_smoothing_keeps_both():
    mixed = lowbit.recipe("smoothquant+llm-int8", threshold=5.0)
    assert [type(step) for step in mixed.steps[:-1]] == [Set] and mixed.steps[-1].solver == Nearest()
    assert mixed.scheme == lowbit.recipe("llm-int8", threshold=5.0).scheme
    searched = lowbit.recipe("smoothquant+llm-int8", alpha="search", outlier_weight="original")
    assert searched.steps[0] == Search(SmoothPowers(20), ("norm_*",))
    assert searched.steps[-1].solver.outliers == ReachingColumns(6.0)
    second_order = lowbit.recipe("llm-int8+gptq", bits=4)
    assert isinstance(second_order.steps[-1].solver, Gptq)
    assert second_order.scheme.rules[0].activation.threshold == 6.0
    with pytest.raises(ValueError, match=r"smoothquant\+llm-int8: a static activation range was measured"):
        lowbit.recipe("smoothquant+llm-int8", level="O3")


@pytest.mark.parametrize("name", ["llm-int8", "smoothquant+llm-int8"])
def test_a_model_with_outlier_channels_is_packed_saved_loaded_and_generates(name, tmp_path):
    path, ids = tiny_llama(tmp_path / "model"), random_ids(4, 24)
    lowbit.quantize(path, lowbit.recipe(name), ids, out=tmp_path / "q", max_kl=50)
    lowbit.quantize(path, lowbit.recipe(name, threshold=0.0), ids, out=tmp_path / "plain", max_kl=50)
    original, found, plain = (lowbit.load(tmp_path / d, torch.float32) for d in ("model", "q", "plain"))
    seen = []
    layer = found.model.layers[0].self_attn.q_proj
    layer.register_forward_pre_hook(lambda _, args: seen.append(len(outlier_channels(args[0], 6.0))))
    assert layer.act.threshold == 6.0
    with torch.no_grad():
        wanted, with_outliers, without = (model(ids).logits for model in (original, found, plain))
    assert 0 < seen[0] < 64 if name == "llm-int8" else seen[0] == 0  # smoothing leaves none there
    assert sqnr_db(wanted, with_outliers) > 25
    assert sqnr_db(wanted, with_outliers) > sqnr_db(wanted, without) + (3 if name == "llm-int8" else 0)
    assert found.generate(ids[:1, :4], max_new_tokens=3, do_sample=False).shape == (1, 7)


def test_smoothing_with_alpha_1_leaves_no_channel_to_take_out(linear, x):
    mixed = lowbit.quantize_linear(linear, x, lowbit.recipe("smoothquant+llm-int8", alpha=1.0))
    (scale,) = mixed.pre
    assert outlier_channels(x, 6.0).tolist() == list(LOUD)
    assert outlier_channels(scale.forward(x), 6.0).tolist() == []
