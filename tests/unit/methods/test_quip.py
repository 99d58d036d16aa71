"""QuIP: rotations that change no function, the rescale, and what the paper promises of the rounding."""

from __future__ import annotations

import copy
import dataclasses
import json
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import lowbit
from lowbit.architectures import block_modules, for_config, resolve, unfuse_experts
from lowbit.architectures.check import float64_everywhere, logits, randomize
from lowbit.checkpoints.native import bits_report
from lowbit.modules import LinearFormat, QuantLinear
from lowbit.numerics import Gram, Int, PerChannel, PerTensor, RmsRange, Spec, quantize
from lowbit.plan import plan
from lowbit.solve import Gptq, Nearest
from lowbit.stages.stream import Call
from lowbit.steps import (
    Balance,
    BlockIO,
    BlockState,
    Incoherence,
    Set,
    Smooth,
    Solve,
)
from lowbit.transforms import Kronecker, RandomHadamard, Scale

from helpers import held, random_ids, sqnr_db, tiny_llama
from laws.test_architectures import CASES, SEEDS

EDGES = ("norm_*", "v_o", "*up_down*")
W8 = Spec(Int(8), PerChannel(), scale_dtype="float32")
ROTATIONS = [Kronecker, RandomHadamard]


def states(model, tokens: Tensor, skip: tuple[str, ...] = ()) -> list[BlockState]:
    """A state for each block of ``model`` with its current inputs; every linear except ``skip`` in 8 bits."""
    architecture = for_config(model.config)
    found = []
    for i, block in enumerate(block_modules(model, architecture)):
        seen = []
        hook = block.register_forward_pre_hook(lambda _, a, k, seen=seen: seen.append((a, k)), with_kwargs=True)
        with torch.no_grad():
            for some in (tokens, tokens[:1]):  # a Call has the arguments of one window
                logits(model, some) if model.dtype == torch.float64 else model(some, use_cache=False)
        hook.remove()
        (args, _), (others, kwargs) = seen
        resolved = resolve(architecture, block, model.config)
        formats = {path: LinearFormat(W8) for path, role in resolved.linears.items() if role not in skip}
        call = Call(others[1:], kwargs)
        with torch.no_grad(), float64_everywhere() if model.dtype == torch.float64 else nullcontext():
            y = call(block, args[0])
        io = _Whole(args[0].detach(), y, call)
        found.append(BlockState.of(f"b{i}", block, resolved, formats, io, seed=i, store_dtype=torch.float64))
    return found


class _Whole(BlockIO):
    """All windows as one."""

    def window(self, i: int) -> Tensor:
        return self.x

    def __len__(self) -> int:
        return 1


def model_of(case: str):
    model_type, options = CASES[case]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options))
    unfuse_experts(model)
    randomize(model.double().eval(), SEEDS.get(case, 0))
    return model, torch.randint(0, model.config.vocab_size, (3, 12), generator=torch.Generator().manual_seed(0))


def assert_unchanged(before: Tensor, after: Tensor) -> None:
    assert (after - before).abs().max() <= 1e-9 * before.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_rescale_and_rotations_change_no_architectures_function(case):
    model, tokens = model_of(case)
    before = logits(model, tokens)
    for state in states(model, tokens):
        weights = {path: state.draft(path).weight.clone() for path in state.formats}
        with float64_everywhere():
            Set(Balance(), EDGES, run_time=True).run(state)
            rotation = Incoherence("kronecker" if state.seed else "hadamard")
            rotation.run(state)
        assert set(held(state, "post")) == set(held(state, "pre")) == set(state.formats)
        assert all((state.draft(path).weight - w).abs().max() > 0.1 for path, w in weights.items())
    assert_unchanged(before, logits(model, tokens))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("models") / "llama", attention_bias=True)


@pytest.fixture
def double(llama):
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    return model, random_ids(3, 20)


def test_statistics_are_of_the_rotated_input_and_its_readers_share_the_rotation(double):
    model, tokens = double
    state = states(model, tokens, skip=("q",))[0]
    with float64_everywhere():
        before = state.collect([Gram()])["attention_in"][Gram()]
        Incoherence("kronecker").run(state)
        after = state.collect([Gram()])["attention_in"][Gram()]
    (rotation,) = state.draft("self_attn.k_proj").pre
    assert state.draft("self_attn.v_proj").pre == (rotation,) and "self_attn.q_proj" not in held(state, "pre")
    assert state.draft("self_attn.k_proj").post != state.draft("self_attn.v_proj").post
    turned = rotation.forward(rotation.forward(before).T)
    torch.testing.assert_close(after, turned, rtol=1e-9, atol=1e-9 * before.abs().max().item())
    assert (after - before).abs().max() > 0.1 * before.abs().max()


def test_a_packed_block_undoes_what_was_rotated_and_keeps_its_biases(double):
    model, tokens = double
    model = model.float()
    state = states(model, tokens)[0]
    state.context = dataclasses.replace(state.context, store_dtype=torch.float32)
    biases = {path: bias.clone() for path, bias in held(state, "bias").items()}
    Set(Balance(), ("norm_*", "up_down")).run(state)  # v -> o would divide the biases of v
    Incoherence().run(state)
    Solve(Nearest()).run(state)
    assert len(biases) == 4
    assert all(torch.equal(state.block.get_submodule(path).bias, bias) for path, bias in biases.items())
    with torch.no_grad():
        assert sqnr_db(state.io.y, state.io.call(state.block, state.io.x)) > 35
    assert all(record.error is not None and 0 < record.error < 1e-3 for record in state.records)


def test_seeds_differ_between_blocks_inputs_and_outputs_and_are_the_same_again(double):
    def seeds() -> list[set[int]]:
        found = []
        for state in states(copy.deepcopy(double[0]), double[1]):
            Incoherence().run(state)
            places = held(state, "pre"), held(state, "post")
            found.append({t.seed for place in places for (t,) in place.values()})
        return found

    first, second = seeds(), seeds()
    assert first == second
    assert all(len(block) == 4 + 7 for block in first) and not first[0] & first[1]


def test_a_fold_across_an_edge_after_the_rotation_is_refused(double):
    state = states(*double)[0]
    Incoherence().run(state)
    with pytest.raises(ValueError, match=r"transformed at run time already.*put that step"):
        Set(Smooth(), ("norm_mlp",)).run(state)
    with pytest.raises(ValueError, match="Search transforms channels that Incoherence has mixed by then"):
        lowbit.recipe("quip+awq")
    assert lowbit.recipe("awq+quip").steps[-2] == Incoherence()
    with pytest.raises(ValueError, match=r"Fisher information.*Incoherence"):
        lowbit.recipe("quip+squeezellm")


# The rescale


def test_the_rescale_balances_every_channel_and_lowers_the_bound(double):
    model, tokens = double
    state = states(model, tokens)[0]
    port = "mlp.down_proj"

    def energies() -> tuple[Tensor, Tensor]:
        h = state.collect([Gram()])["mlp_hidden"][Gram()].diagonal()
        return h, state.draft(port).weight.square().sum(0)

    with float64_everywhere():
        h, w = energies()
        Set(Balance(), ("*up_down*",)).run(state)
        h2, w2 = energies()
    assert h2.sum() * w2.sum() < 0.9 * h.sum() * w.sum()
    torch.testing.assert_close(h2 * w2, h * w, rtol=1e-9, atol=0)
    ratio = h2 / w2  # equal for all channels, up to the rounding of d to float16, which enters four times
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=4 * 2.0**-10, atol=0)


def test_readers_of_one_edge_share_the_rescale_of_their_sum(double):
    model, tokens = double
    state = states(model, tokens)[0]
    with float64_everywhere():
        stats = state.collect([Gram()])
        scale = Balance()(state, state.resolved.edge("norm_mlp"), stats)
    w = sum(state.draft(f"mlp.{name}_proj").weight.square().sum(0) for name in ("gate", "up"))
    d = (stats["mlp_in"][Gram()].diagonal() / w).pow(0.25)
    assert scale.s.dtype == torch.float16
    torch.testing.assert_close(scale.s.double(), d / d.log().mean().exp(), rtol=2.0**-10, atol=0)


def test_dead_channels_are_not_rescaled(double):
    state = states(*double)[0]
    with torch.no_grad():
        state.block.post_attention_layernorm.weight[5] = 0
    with float64_everywhere():
        scale = Balance()(state, state.resolved.edge("norm_mlp"), state.collect([Gram()]))
    assert torch.isfinite(scale.s).all() and scale.s[5] == pytest.approx(scale.s.median(), rel=20)


def test_where_no_edge_carries_a_scale_the_linear_rescales_its_own_input():
    model, tokens = model_of("gpt2")
    state = states(model, tokens)[0]
    before = logits(model, tokens)
    with float64_everywhere():
        Set(Balance(), EDGES, run_time=True).run(state)
    assert (
        state.notes == []
        and set(held(state, "pre")) == {"mlp.c_proj"}
        and isinstance(state.draft("mlp.c_proj").pre[0], Scale)
    )  # after a GELU
    assert_unchanged(before, logits(model, tokens))


# What the paper says of rounding


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(n: int, tokens: int = 400) -> Tensor:
    x = normal(tokens, n, seed=1) @ (torch.eye(n, dtype=torch.float64) + 0.2 * normal(n, n, seed=2))
    x[:, 3] *= 10
    return x.T @ x


def proxy(delta_OI: Tensor, h_II: Tensor) -> float:
    return ((delta_OI @ h_II) * delta_OI).sum().item()


def mu(w: Tensor) -> float:
    """Incoherence: the largest magnitude over the root mean square."""
    return (w.abs().max() / w.square().mean().sqrt()).item()


@pytest.mark.parametrize("kind", ROTATIONS)
def test_the_loss_is_the_same_before_and_after_rescale_and_rotation(kind):
    delta, h = normal(16, 36), gram(36)
    d = (normal(36, seed=5) / 2).exp()
    v, u = kind(1, 36), kind(2, 16)
    turned = u.fold_out(v.fold_in(delta * d, None)[0], None)[0]
    h_turned = v.forward(v.forward(h / d / d[:, None]).T)
    assert proxy(turned, h_turned) == pytest.approx(proxy(delta, h), rel=1e-10)
    eigenvalues = torch.linalg.eigvalsh(v.forward(v.forward(h).T))
    torch.testing.assert_close(eigenvalues, torch.linalg.eigvalsh(h), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ROTATIONS)
def test_planted_outliers_disappear_and_the_weight_returns(kind):
    w = normal(96, 120).float()
    w[7, 11], w[40, :] = 60.0, w[40] * 6
    v, u = kind(1, 120), kind(2, 96)
    turned = u.fold_out(v.fold_in(w, None)[0], None)[0]
    assert mu(w) > 20 > 8 > mu(turned)
    back = u.inverse().fold_out(v.inverse().fold_in(turned, None)[0], None)[0]
    assert ((back - w).norm() / w.norm()).item() < 1e-6


@pytest.mark.parametrize("kind", ROTATIONS)
def test_rotations_help_where_weights_have_outliers(kind):
    w, h = normal(96, 120), gram(120)
    w[7, 11], w[40, :] = 60.0, w[40] * 6
    v, u = kind(1, 120), kind(2, 96)
    turned, h_turned = u.fold_out(v.fold_in(w, None)[0], None)[0], v.forward(v.forward(h).T)
    spec = Spec(Int(3, zero="real"), PerTensor(), scale_dtype="float32")
    plain = Gptq(RmsRange(2.4)).solve(w, spec, {Gram(): h}).q.dequantize().double()
    rotated = Gptq(RmsRange(2.4)).solve(turned, spec, {Gram(): h_turned}).q.dequantize().double()
    assert proxy(rotated - turned, h_turned) < 0.6 * proxy(plain - w, h)


def test_rounding_with_feedback_costs_tr_d_where_rounding_alone_costs_tr_h():
    w, h = normal(4000, 40), gram(40)
    r = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)
    trace_d = r.diagonal().square().sum().item()
    assert trace_d < 0.9 * h.trace().item()
    spec = Spec(Int(8, zero="real"), PerTensor(), scale_dtype="float32")
    fit = RmsRange(12.0)  # nothing clips
    solved = Gptq(fit, damp=0.0).solve(w, spec, {Gram(): h}).q
    nearest = quantize(w, spec, fit)
    unit = len(w) / 12 * solved.params.scale.double().square().item()
    assert proxy(solved.dequantize().double() - w, h) == pytest.approx(unit * trace_d, rel=0.05)
    assert proxy(nearest.dequantize().double() - w, h) == pytest.approx(unit * h.trace().item(), rel=0.05)


def test_uncorrelated_inputs_make_it_round_to_nearest():
    w, spec = normal(20, 32), Spec(Int(2, zero="real"), PerTensor())
    solved = Gptq(RmsRange()).solve(w, spec, {Gram(): torch.eye(32)})
    assert torch.equal(solved.q.codes, quantize(w, spec, RmsRange()).codes)
    assert len(solved.q.codes.unique()) <= 4


def test_greedy_passes_lower_the_loss_of_the_rotated_weight():
    linear, x = lone()
    losses = []
    for passes in (0, 1, 4):
        q = lowbit.quantize_linear(linear, x, lowbit.recipe("quip", bits=2, greedy_passes=passes))
        losses.append(proxy(q.effective_weight().double() - linear.weight.double(), x.double().T @ x.double()))
    assert losses[0] > losses[1] >= losses[2]


# The method


def lone() -> tuple[nn.Linear, Tensor]:
    linear = nn.Linear(96, 60)
    with torch.no_grad():
        linear.weight.copy_(normal(60, 96).float() / 10)
        linear.weight[3, 5] = 2.0
        linear.bias.copy_(normal(60, seed=9))
    x = normal(400, 96, seed=1) @ (torch.eye(96).double() + 0.06 * normal(96, 96, seed=2))
    x[:, [3, 50]] *= 30
    return linear.requires_grad_(False), x.float()


@pytest.mark.parametrize("transform", ["kronecker", "hadamard"])
@pytest.mark.parametrize(("bits", "floor_db"), [(2, 10), (3, 16), (4, 22)])
def test_a_lone_linear_counts_its_seeds_and_beats_the_column_solver_alone(transform, bits, floor_db):
    linear, x = lone()
    q = lowbit.quantize_linear(linear, x, lowbit.recipe("quip", bits=bits, transform=transform))
    without = lowbit.quantize_linear(linear, x, lowbit.recipe("quip", bits=bits, transform="none"))
    assert q.stored_bits == bits * 96 * 60 + 2 * 16 + 2 * 64
    assert without.stored_bits == bits * 96 * 60 + 2 * 16
    assert sqnr_db(linear(x), q(x)) > max(floor_db, sqnr_db(linear(x), without(x)))
    assert len(q.qtensor().codes.unique()) <= 2**bits and torch.equal(q.bias, linear.bias)


def test_the_rescale_of_a_lone_linear_is_sixteen_bits_a_channel():
    linear, x = lone()
    q = lowbit.quantize_linear(linear, x, lowbit.recipe("quip", bits=2, balance=True, transform="kronecker", rho=2.4))
    assert q.stored_bits == 2 * 96 * 60 + 2 * 16 + 2 * 64 + 16 * 96
    assert [type(t).__name__ for t in q.pre] == ["Scale", "Kronecker"]
    assert sqnr_db(linear(x), q(x)) > 8


def test_it_mixes_with_scales_before_it_and_with_other_rounding_after_it():
    linear, x = lone()
    for name, options in {"awq+quip": {"bits": 3}, "quip+gptq": {"bits": 3, "group_size": 32}}.items():
        q = lowbit.quantize_linear(linear, x, lowbit.recipe(name, **options))
        assert sqnr_db(linear(x), q(x)) > 15 and isinstance(q, QuantLinear)
        assert isinstance(q.post[-1], RandomHadamard)


def test_options_that_cannot_be_are_refused():
    for options in ({"bits": 9}, {"bits": 0}, {"transform": "haar"}, {"greedy_passes": -1}):
        with pytest.raises(ValueError, match=str(next(iter(options.values())))):
            lowbit.recipe("quip", **options)


@pytest.mark.parametrize("options", [{}, {"balance": True, "transform": "kronecker"}], ids=["as shipped", "rescaled"])
def test_a_model_is_quantized_saved_and_read_back(llama, tmp_path, options):
    ids = random_ids(4, 24)
    report = lowbit.quantize(llama, lowbit.recipe("quip", bits=4, **options), ids, out=tmp_path / "q", max_kl=5)
    assert report.coverage == 1.0 and all(layer.error is not None and layer.error < 0.05 for layer in report.layers)
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["quantization_config"]["version"] == 2
    tensors = {k: v for f in (tmp_path / "q").glob("*.safetensors") for k, v in load_file(f).items()}
    assert tensors["model.layers.0.mlp.up_proj.post0_seed"].dtype == torch.int64
    foretold = plan(llama, lowbit.recipe("quip", bits=4, **options)).bits_per_weight
    assert foretold == pytest.approx(bits_report(tmp_path / "q")["bits_per_weight"], abs=1e-9)
    read, original = lowbit.load(tmp_path / "q"), lowbit.load(llama)
    with torch.no_grad():
        assert sqnr_db(original(input_ids=ids).logits, read(input_ids=ids).logits) > 12
    generated = read.generate(ids[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert generated.shape == (1, 27)
