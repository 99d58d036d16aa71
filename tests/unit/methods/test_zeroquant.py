"""ZeroQuant: what its groups, its token ranges and its distillation promise."""

from __future__ import annotations

import copy
import hashlib
import itertools

import pytest
import torch
from transformers import AutoConfig

import lowbit
from lowbit.architectures import ROLE_GROUPS, for_config
from lowbit.linear_api import LoneLinear, lone_block
from lowbit.modules import LinearFormat, QuantLinear
from lowbit.numerics import Int, MinMax, PerChannel, RowBands, Spec, quantize
from lowbit.scheme import activation
from lowbit.solve import Nearest
from lowbit.steps import AllWeights, BlockIO, BlockState, Learn, Solve

from helpers import random_ids, sqnr_db, tiny_llama
from laws.test_architectures import CASES

BANDS = Spec(Int(4, symmetric=True, full=True), RowBands(8))


def _state(spec: Spec = BANDS, act=None, bias: bool = True) -> BlockState:
    torch.manual_seed(0)
    linear = torch.nn.Linear(32, 24, bias=bias).requires_grad_(False)
    x = torch.randn(8, 16, 32) @ torch.randn(32, 32)
    block = LoneLinear(linear)
    y = torch.cat([block(window[None]) for window in x])
    io = BlockIO(x, y, lambda run, window: run(window))
    return BlockState.of("", block, lone_block(linear), {"linear": LinearFormat(spec, act)}, io)


def _loss(state: BlockState) -> float:
    assert state.io is not None and state.io.y is not None
    found = torch.cat([state.block(window[None]) for window in state.io.x])
    return (found - state.io.y).square().mean().item()


def _learn(steps: int, lr: float = 1e-4, **options) -> Learn:
    return Learn((AllWeights(lr),), steps=steps, **{"batch": 4} | options)


def test_a_band_of_one_row_is_per_channel():
    w = torch.randn(24, 40)
    of_rows = quantize(w, Spec(Int(4, symmetric=True), RowBands(24)), MinMax())
    per_channel = quantize(w, Spec(Int(4, symmetric=True), PerChannel()), MinMax())
    assert torch.equal(of_rows.codes, per_channel.codes) and torch.equal(of_rows.dequantize(), per_channel.dequantize())
    assert RowBands(1000).param_shape((24, 40)) == (24, 1)


def test_the_error_falls_as_the_number_of_bands_doubles():
    w = torch.randn(64, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 64)[:, None]
    errors = [
        (quantize(w, Spec(Int(4, symmetric=True, full=True), RowBands(2**k)), MinMax()).dequantize() - w).square().sum()
        for k in range(7)
    ]
    assert all(finer < coarser for coarser, finer in itertools.pairwise(errors))


def test_every_code_is_used_and_only_the_positive_extreme_is_clipped():
    grid = Int(4, symmetric=True, full=True)
    x = torch.linspace(-1, 1, 2001)[None]
    params = grid.from_range(torch.tensor([[-1.0]]), torch.tensor([[1.0]]))
    assert params.scale.item() == 2 / 2**4
    values = grid.decode(grid.encode(x, params), params)
    assert values.unique().numel() == 16 and values.min() == -1 and values.max() == 1 - 1 / 8
    for wrong in ({"symmetric": False}, {"bits": 1, "symmetric": True}):
        with pytest.raises(ValueError, match="symmetric grid of 2 or more bits"):
            Int(**{"bits": 4, "full": True} | wrong)


def test_bands_run_in_the_compiled_kernels_as_they_dequantize():
    torch.manual_seed(0)
    linear = torch.nn.Linear(48, 37)
    for act in (None, 8):
        q = lowbit.quantize_linear(
            linear, None, lowbit.recipe("zeroquant", bits=4, groups=5, activation_bits=act, distil=False)
        )
        x = torch.randn(7, 48)
        plain = q(x)
        assert q.prepare() is None
        assert sqnr_db(plain, q(x)) > 90
        assert torch.equal(q.dequantize(), copy.deepcopy(q).qtensor().dequantize())


def test_scaling_one_token_scales_only_its_output_and_order_does_not_matter():
    torch.manual_seed(0)
    q = lowbit.quantize_linear(torch.nn.Linear(32, 24, bias=False), None, lowbit.recipe("zeroquant", distil=False))
    x = torch.randn(5, 32)
    louder = x.clone()
    louder[2] *= 4
    found, wanted = q(louder), q(x)
    wanted[2] *= 4
    assert torch.equal(found, wanted)
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.equal(q(x[order]), q(x)[order])


def test_a_token_of_zeros_gives_the_bias():
    linear = torch.nn.Linear(32, 24)
    q = lowbit.quantize_linear(linear, None, lowbit.recipe("zeroquant", distil=False))
    assert torch.equal(q(torch.zeros(1, 32))[0], linear.bias)


def test_without_steps_distillation_is_plain_rounding():
    plain, untouched = _state(), _state()
    Solve(Nearest()).run(plain)
    _learn(0).run(untouched)
    Solve(Nearest()).run(untouched)
    assert torch.equal(plain.block.linear.codes, untouched.block.linear.codes)
    assert torch.equal(plain.block.linear.bias, untouched.block.linear.bias)


@pytest.mark.parametrize("act", [None, activation(6)], ids=["weights", "weights and inputs"])
def test_distillation_lowers_the_blocks_error_and_moves_the_bias_too(act):
    plain, learned = _state(act=act), _state(act=act)
    Solve(Nearest()).run(plain)
    _learn(100).run(learned)
    assert not torch.equal(learned.block.linear.bias, _state().block.linear.bias)
    Solve(Nearest()).run(learned)
    assert _loss(learned) < 0.9 * _loss(plain)


def test_distillation_that_only_hurts_is_not_kept():
    plain, learned = _state(), _state()
    _learn(4, lr=10.0).run(learned)
    assert torch.equal(learned.draft("linear").weight, plain.draft("linear").weight)


def test_every_floating_parameter_of_a_block_is_learned(tmp_path):
    """Norms and biases are learned too. Weights of other blocks belong to their own distillation."""
    path = tiny_llama(tmp_path / "model", attention_bias=True)
    recipe = lowbit.recipe("zeroquant", bits=4, lr=3e-5, steps=6, batch=2)
    lowbit.quantize(path, recipe, random_ids(4, 24), out=tmp_path / "q", max_kl=50)
    before, after = (lowbit.load(p, torch.float32).state_dict() for p in (path, tmp_path / "q"))
    for name in ("input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.v_proj.bias"):
        full = f"model.layers.0.{name}"
        assert not torch.equal(before[full], after[full]), name
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(before[name], after[name])


def test_a_block_is_distilled_on_what_the_original_blocks_give(tmp_path):
    """Skipping block 0 would change a quantized prefix. Block 1 learns from the original's inputs alone."""
    path, ids = tiny_llama(tmp_path / "model"), random_ids(4, 24)
    recipe = lowbit.recipe("zeroquant", bits=3, lr=3e-5, steps=6, batch=2)
    tensors = []
    for name, changed in (
        ("all", recipe),
        ("rest", recipe.with_overrides([{"match": "re:layers\\.0\\.", "skip": True}])),
    ):
        lowbit.quantize(path, changed, ids, out=tmp_path / name, max_kl=50)
        tensors.append(lowbit.load(tmp_path / name, torch.float32).state_dict())
    ours = [key for key in tensors[0] if key.startswith("model.layers.1.")]
    assert len(ours) > 10 and all(torch.equal(tensors[0][key], tensors[1][key]) for key in ours)
    norm = "model.layers.1.input_layernorm.weight"
    assert not torch.equal(tensors[0][norm], lowbit.load(path, torch.float32).state_dict()[norm]), "nothing was learned"


def test_batches_whose_gradients_are_gathered_make_the_step_of_one_batch():
    at_once, in_turn = _state(), _state()
    _learn(5, batch=8).run(at_once)
    _learn(5, batch=1, accumulate=8).run(in_turn)
    torch.testing.assert_close(*(state.draft("linear").weight for state in (at_once, in_turn)), atol=1e-6, rtol=0)
    assert (at_once.draft("linear").weight - _state().draft("linear").weight).abs().max() > 1e-4


def test_one_recipe_gives_the_mlp_other_widths(tmp_path):
    path = tiny_llama(tmp_path / "model")
    recipe = lowbit.recipe("zeroquant", bits=8, ffn_bits=4, distil=False)
    report = lowbit.quantize(path, recipe, None, out=tmp_path / "q")
    widths = {layer.role: round(layer.bits_per_weight) for layer in report.layers}
    assert widths == dict.fromkeys("qkvo", 8) | dict.fromkeys(("gate", "up", "down"), 4)
    assert isinstance(lowbit.load(tmp_path / "q").model.layers[0].mlp.up_proj, QuantLinear)


def test_bands_and_group_sizes_are_not_given_together():
    with pytest.raises(ValueError, match="give one, found 8 and 32"):
        lowbit.recipe("zeroquant", groups=8, group_size=32)
    assert not lowbit.recipe("zeroquant", distil=False).needs_calibration
    assert lowbit.recipe("zeroquant").needs_calibration


@pytest.mark.parametrize("method", ["zeroquant", "rptq"])
def test_a_run_that_was_stopped_continues_to_the_same_bytes(method, tmp_path):
    path, ids = tiny_llama(tmp_path / "model", blocks=3), random_ids(4, 24)
    options = {"lr": 3e-5, "steps": 4, "batch": 2} if method == "zeroquant" else {"clusters": 8, "head_clusters": 2}
    recipe = lowbit.recipe(method, bits=4, **options)

    def stop(done: float, total: float, what: str) -> None:
        if done > 1.5:
            raise KeyboardInterrupt

    lowbit.quantize(path, recipe, ids, out=tmp_path / "whole", max_kl=50)
    with pytest.raises(KeyboardInterrupt):
        lowbit.quantize(path, recipe, ids, out=tmp_path / "stopped", max_kl=50, progress=stop)
    assert len(list((tmp_path / "stopped.partial").glob("*.safetensors"))) == 1
    lowbit.quantize(path, recipe, ids, out=tmp_path / "stopped", max_kl=50)
    files = sorted(file.name for file in (tmp_path / "whole").glob("*.safetensors"))
    assert files
    for name in files:
        whole, continued = ((tmp_path / run / name).read_bytes() for run in ("whole", "stopped"))
        assert hashlib.sha256(whole).digest() == hashlib.sha256(continued).digest(), name


@pytest.mark.parametrize("case", CASES)
def test_every_role_of_a_table_is_of_attention_or_of_the_mlp_and_behind_a_norm_where_its_edge_says_so(case):
    model_type, options = CASES[case]
    table = for_config(AutoConfig.for_model(model_type, **options))
    roles = {linear.role for linear in table.linears}
    assert {role for role in roles if (role in ROLE_GROUPS["attention"]) != (role in ROLE_GROUPS["mlp"])} == roles
    read = {end.role for edge in table.edges if edge.name.startswith("norm_") for end in edge.consumers} & roles
    assert read <= ROLE_GROUPS["behind_norm"]
    assert not ROLE_GROUPS["behind_norm"] & {"o", "down", "fc2", "expert_down", "shared_down"}
