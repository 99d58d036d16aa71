"""Quantization-aware training of all weights: what it computes is what is stored, and where it starts and ends."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lowbit
from lowbit.data import Calibration
from lowbit.modules import QuantLinear, restore
from lowbit.numerics import (
    HALVES,
    NF3,
    NF4,
    Codebook,
    Flat,
    Float,
    Int,
    KMeans,
    Magnitude,
    Minimum,
    MinMax,
    Normal,
    PerChannel,
    PerGroup,
    SignedScale,
    Spec,
    Table,
    Unsigned,
    limited,
)
from lowbit.recipes import Blockwise, Recipe, Train
from lowbit.scheme import activation, attention, linears
from lowbit.solve import Gptq, Nearest
from lowbit.stages import descent
from lowbit.stages.train import Training
from lowbit.steps import SearchClip, Set, Smooth, Solve
from lowbit.training import Cosine, LatentWeights, OriginalKL, StoredFloats, TrainedModel, replaced

from helpers import assert_same, random_ids, tiny_llama

QUIET = {"max_kl": 50.0, "allow_broken": True}
STATS = Spec(Int(8, zero="real"), PerGroup(16))
FORMATS: dict[str, tuple[Spec, LatentWeights]] = {
    "symmetric channels": (Spec(Int(4, symmetric=True), PerChannel()), LatentWeights()),
    "asymmetric groups": (Spec(Int(2), PerGroup(32)), LatentWeights()),
    "ragged groups": (Spec(Int(3), PerGroup(40)), LatentWeights()),
    "constant ranges": (Spec(Int(3), PerGroup(32)), LatentWeights(through_ranges=False)),
    "real zero points": (Spec(Int(3, zero="real"), PerGroup(32)), LatentWeights()),
    "two-sided table": (Spec(NF3, PerGroup(32)), LatentWeights()),
    "double quantization": (Spec(NF4, Flat(64), STATS, "float32", True), LatentWeights()),
    "half integers": (Spec(HALVES, PerChannel()), LatentWeights(Magnitude("mean", 1.5))),
    "half integers, ragged groups": (Spec(HALVES, PerGroup(40)), LatentWeights(Magnitude("mean", 1.5))),
    "signs": (Spec(Int(1, symmetric=True), PerChannel()), LatentWeights(Magnitude())),
    "learned steps": (Spec(Int(4, symmetric=True), PerChannel()), LatentWeights(None)),
    "learned steps, zero points": (Spec(Int(3), PerGroup(32)), LatentWeights(None)),
    "learned steps, real zero points": (Spec(Int(3, zero="real"), PerGroup(32)), LatentWeights(None)),
    "learned steps, two-sided": (Spec(NF3, PerGroup(32)), LatentWeights(None)),
    "learned steps, double quantization": (Spec(NF4, Flat(64), STATS, "float32", True), LatentWeights(None)),
    "learned steps of either sign": (
        Spec(Table((-3.0, -1.0, 0.5, 2.0), signed=True), PerGroup(32)),
        LatentWeights(None),
    ),
    "learned steps, Q4_0": (Spec(SignedScale(4), PerGroup(32)), LatentWeights(None)),
    "learned steps and minima on two levels": (
        Spec(Minimum(4), PerGroup(16), Spec(Unsigned(6), PerGroup(2))),
        LatentWeights(None),
    ),
    "learned steps of half integers": (Spec(HALVES, PerChannel()), LatentWeights(None)),
    "floats": (Spec(Float(2, 1), PerGroup(16)), LatentWeights()),
    "normal levels": (Spec(Normal(3), PerGroup(32)), LatentWeights(None)),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("latent") / "model", dtype=torch.bfloat16)


def text(further: int = 8) -> Calibration:
    ids = random_ids(8, 32)
    return Calibration(ids[:4], "a text", "0", held_out=ids[4:6], further=random_ids(further, 32, seed=3))


def recipe(
    spec: Spec, what: Any = LatentWeights(), steps: tuple = (), solver: Any = None, act=None, **settings: Any
) -> Recipe:
    fit = what.ranges if isinstance(what, LatentWeights) and what.ranges is not None else MinMax()
    options = {"tokens": 256, "lr": 1e-3, "schedule": Cosine(), **settings}
    blockwise = Blockwise((*steps, Solve(solver or Nearest(fit))), "fp")
    return Recipe("trained", linears(spec, act), (blockwise, Train(what, OriginalKL(), **options)))


def run(place, out, recipe: Recipe, monkeypatch=None, calibration=None):
    """The report, and the logits of the model in training, at its end, on some windows."""
    seen: dict[str, torch.Tensor] = {}
    if monkeypatch is not None:
        commit = TrainedModel.commit

        def watched(self):
            with self, torch.no_grad(), replaced(self.model, self.replaced()):
                seen["logits"] = self.model(input_ids=random_ids(2, 24, seed=5), use_cache=False).logits
            commit(self)

        monkeypatch.setattr(TrainedModel, "commit", watched)
    report = lowbit.quantize(place, recipe, calibration or text(), out=out, **QUIET)
    return report, seen.get("logits")


def stored_logits(out) -> torch.Tensor:
    model = lowbit.load(out, torch.float32)
    restore(model)
    with torch.no_grad():
        return model(input_ids=random_ids(2, 24, seed=5), use_cache=False).logits


def tensors(out) -> dict[str, torch.Tensor]:
    return {name: t for shard in out.glob("*.safetensors") for name, t in load_file(shard).items()}


@pytest.mark.parametrize("name", FORMATS)
def test_the_model_in_training_computes_what_the_checkpoint_computes_bit_for_bit(name, place, tmp_path, monkeypatch):
    spec, what = FORMATS[name]
    _, logits = run(place, tmp_path / "out", recipe(spec, dataclasses.replace(what, gains=True)), monkeypatch)
    assert logits is not None
    assert_same(stored_logits(tmp_path / "out"), logits)


@pytest.mark.parametrize(
    ("about", "changes"),
    [
        ("inputs of 8 bits", {"act": activation(8)}),
        ("inputs of 4 bits with zero points", {"act": activation(4, symmetric=False)}),
        ("inputs that take out channels", {"act": activation(8, threshold=2.0)}),
        ("clipped ranges", {"steps": (SearchClip(8, apart=True),)}),
        ("smoothed inputs", {"steps": (Set(Smooth(), ("norm_*",)),), "act": activation(8)}),
        ("column solver with its own order", {"solver": Gptq(order="act")}),
        ("inputs without gradients over a limit", {"what": LatentWeights(limit=1.0), "act": activation(8)}),
    ],
)
def test_so_it_does_with(about, changes, place, tmp_path, monkeypatch):
    _, logits = run(place, tmp_path / "out", recipe(Spec(Int(3), PerGroup(32)), **changes), monkeypatch)
    assert logits is not None
    assert_same(stored_logits(tmp_path / "out"), logits)


def test_attention_of_few_bits_is_seen_by_training(place, tmp_path, monkeypatch):
    """Products of attention are integers where no gradient is asked for, so here they agree but for the order of sums."""
    made = recipe(Spec(Int(4), PerGroup(32)), act=activation(8))
    made = dataclasses.replace(made, scheme=dataclasses.replace(made.scheme, attention=attention(8)))
    _, logits = run(place, tmp_path / "out", made, monkeypatch)
    assert logits is not None
    torch.testing.assert_close(stored_logits(tmp_path / "out"), logits, rtol=1e-3, atol=1e-3)


def test_training_moves_codes_and_comes_closer_to_the_original(place, tmp_path):
    spec = Spec(Int(2), PerGroup(32))
    plain, _ = run(place, tmp_path / "plain", recipe(spec, tokens=0))
    after, _ = run(place, tmp_path / "after", recipe(spec, tokens=4096, lr=3e-3, measures=4))
    assert plain.kl is not None and after.kl is not None and after.kl < 0.9 * plain.kl
    assert plain.bits_per_weight == after.bits_per_weight
    old, new = tensors(tmp_path / "plain"), tensors(tmp_path / "after")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert any(name.endswith("codes") for name in changed)
    assert not any("embed" in name or "lm_head" in name or "norm" in name for name in changed)


@pytest.mark.parametrize(
    ("what", "steps"),
    [(LatentWeights(), ()), (LatentWeights(None), ()), (LatentWeights(), (SearchClip(8, apart=True),))],
)
@pytest.mark.parametrize("spec", [Spec(Int(2), PerGroup(32)), Spec(NF3, PerGroup(32))], ids=str)
def test_zero_tokens_store_what_blockwise_stored(what, steps, spec, place, tmp_path):
    """So training goes on where a search of ranges ended."""
    made = recipe(spec, what, steps, tokens=0)
    run(place, tmp_path / "zero", made)
    run(place, tmp_path / "plain", dataclasses.replace(made, stages=made.stages[:1]))
    old, new = tensors(tmp_path / "plain"), tensors(tmp_path / "zero")
    assert old.keys() == new.keys() and not [name for name in old if not torch.equal(old[name], new[name])]


@pytest.mark.parametrize("name", [name for name, (_, what) in FORMATS.items() if what.ranges is None])
def test_a_relative_rate_moves_every_learned_step_by_its_share(name, place, tmp_path):
    """A step of Adam is as long as the rate, whatever the gradient: one step of 1 % moves no scale by more than 1 %, up or down."""
    spec, what = FORMATS[name]
    made = recipe(spec, what, tokens=32, lr=1e-2, measures=0)
    run(place, tmp_path / "trained", made)
    run(place, tmp_path / "plain", dataclasses.replace(made, stages=made.stages[:1]))
    old, new = (lowbit.load(tmp_path / each, torch.float32) for each in ("plain", "trained"))
    layers = [name for name, module in old.named_modules() if isinstance(module, QuantLinear)]
    for layer in layers:
        before, after = (model.get_submodule(layer).qtensor().params._asdict() for model in (old, new))
        for field in (each for each in spec.grid.fields if each.bits is None and not each.in_levels):
            a, b = before[field.name], after[field.name]
            assert (a.sign() * b.sign() >= 0).all(), (layer, field.name)
            coarse = 0.25 if spec.stats else 0.011  # the second level rounds
            assert ((b - a).abs() <= coarse * a.abs().amax(1, keepdim=True) + 1e-6).all(), (layer, field.name)


def test_codes_of_a_column_solver_are_where_learned_ranges_start(place, tmp_path):
    made = recipe(Spec(Int(3), PerGroup(32)), LatentWeights(None), solver=Gptq(), tokens=0)
    run(place, tmp_path / "zero", made)
    run(place, tmp_path / "plain", dataclasses.replace(made, stages=made.stages[:1]))
    old, new = tensors(tmp_path / "plain"), tensors(tmp_path / "zero")
    assert not [name for name in old if not torch.equal(old[name], new[name])]


def test_latents_are_not_left_behind_and_a_lost_file_lets_its_block_be_made_again(place, tmp_path, monkeypatch):
    made = recipe(Spec(Int(3), PerGroup(32)), tokens=64)
    run(place, tmp_path / "whole", made)

    def stop(self):
        assert len(list(self.section.directory.glob("latents-*.safetensors"))) == 2
        (self.section.directory / "latents-00002.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Training, "run", stop)
        with pytest.raises(KeyboardInterrupt):
            run(place, tmp_path / "lost", made)
    run(place, tmp_path / "lost", made)
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "lost"))
    assert a == b
    assert not list((tmp_path / "lost").glob("latents-*")) and not list((tmp_path / "lost").glob("*.state"))


def test_a_killed_training_of_weights_ends_in_the_same_bytes(place, tmp_path, monkeypatch):
    monkeypatch.setattr(descent, "SAVE_SECONDS", 0.0)
    made = recipe(Spec(Int(3), PerGroup(32)), LatentWeights(None, gains=True), tokens=320, measures=3, batch=1)
    lowbit.quantize(place, made, text(), out=tmp_path / "whole", **QUIET)

    def stop(done, total, what):
        if what.startswith("training, step 6 "):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lowbit.quantize(place, made, text(), out=tmp_path / "killed", progress=stop, **QUIET)
    lowbit.quantize(place, made, text(), out=tmp_path / "killed", **QUIET)
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert a == b


# Gradients


class One(torch.nn.Module):
    def __init__(self, layer: QuantLinear):
        super().__init__()
        self.layer = layer


def trained_layer(spec: Spec, what: LatentWeights, act=None, seed: int = 0):
    """The parameters of one layer in training, the layer, and its latent weight."""
    from lowbit.numerics import quantize
    from lowbit.training import Start

    w = torch.randn(12, 24, generator=torch.Generator().manual_seed(seed))
    q = quantize(w, spec, what.ranges or MinMax())
    model = One(QuantLinear.from_qtensor(q, act=act))
    return what.parameters(model, Start({"layer": w})), model.layer, w


@pytest.mark.parametrize("ranges", [MinMax(), None])
def test_gradients_pass_the_rounding_straight_through(ranges):
    parameters, layer, _w = trained_layer(
        Spec(Int(4, symmetric=True), PerChannel()), LatentWeights(ranges, through_ranges=False)
    )
    x, g = (
        torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(((5, 24), (5, 12)))
    )
    with parameters:
        (layer(x) * g).sum().backward()
    found = parameters.groups[0].leaves[0].grad
    assert found is not None
    torch.testing.assert_close(found, g.T @ x, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_learned_step_is_that_of_the_paper():
    """LSQ, equation 3: round(v) - v inside the range, the level at its end outside."""
    parameters, layer, _w = trained_layer(
        Spec(Int(3, symmetric=True), PerChannel(), scale_dtype="float32"), LatentWeights(None)
    )
    latent, share = (group.leaves[0] for group in parameters.groups[:2])
    with torch.no_grad():
        latent.mul_(1.3)  # so that some values are clipped
    x, g = (
        torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(((5, 24), (5, 12)))
    )
    with parameters:
        (layer(x) * g).sum().backward()
    scale = layer.qtensor().params.scale
    v = latent.detach() / scale
    of_step = torch.where(v > 3.5, 3.0, torch.where(v < -4.5, -4.0, v.round() - v))
    wanted = (of_step * (g.T @ x)).sum(1, keepdim=True) * scale  # in units of the start
    inside = (v.round() >= -4) & (v.round() <= 3)
    assert share.grad is not None and latent.grad is not None and not bool(inside.all())
    torch.testing.assert_close(share.grad, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(latent.grad, torch.where(inside, g.T @ x, 0.0), rtol=1e-4, atol=1e-4)


def test_a_limit_takes_gradients_and_changes_no_value():
    x = torch.tensor([0.5, -1.9, 2.0, -3.0], requires_grad=True)
    y = limited(x, 2.0)
    assert torch.equal(y, x)
    y.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("grid", "limits"), [(Int(3, symmetric=True), True), (Int(2, symmetric=True), False), (Int(4), False)]
)
def test_the_limit_is_of_symmetric_weights_of_three_bits_or_more_and_of_quantized_inputs(grid, limits):
    parameters, layer, w = trained_layer(
        Spec(grid, PerChannel()), LatentWeights(through_ranges=False, limit=1.0), activation(8)
    )
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with parameters:
        layer(x).square().sum().backward()
    of_weight = parameters.groups[0].leaves[0].grad
    assert of_weight is not None and x.grad is not None
    assert bool((of_weight[w.abs() >= 1] == 0).all()) == limits
    assert bool((of_weight[w.abs() < 1] != 0).all())
    assert bool((x.grad[x.abs() >= 1] == 0).all()) and bool((x.grad[x.abs() < 1] != 0).float().mean() > 0.9)


def test_scales_and_gains_have_rates_of_their_own(place, tmp_path):
    made = {}
    for name, rates in {"still": (1e-9, 1e-9), "scales": (1.0, 1e-9), "gains": (1e-9, 1.0)}.items():
        how = LatentWeights(None, gains=True, range_rate=rates[0], gain_rate=rates[1])
        run(place, tmp_path / name, recipe(Spec(Int(4), PerChannel()), how, lr=1e-2, measures=0))
        made[name] = tensors(tmp_path / name)
    still = made.pop("still")
    for name, found in made.items():
        moved = {key.rpartition(".")[2] for key in found if not torch.equal(found[key], still[key])}
        assert ("scale" in moved) == (name == "scales"), moved
        norms = [key for key in found if key.endswith("norm.weight")]
        assert norms and all((not torch.equal(found[key], still[key])) == (name == "gains") for key in norms)


# Refusals


def test_formats_and_orders_that_cannot_be_trained_are_refused():
    with pytest.raises(ValueError, match="not placed by a range"):
        recipe(Spec(Codebook(3), PerChannel()), LatentWeights(None), solver=Nearest(KMeans()))
    with pytest.raises(ValueError, match="put it right after Blockwise"):
        made = recipe(Spec(Int(3), PerGroup(32)))
        tuned = Train(StoredFloats(), OriginalKL())
        dataclasses.replace(made, stages=(made.stages[0], tuned, made.stages[1]))
    with pytest.raises(ValueError, match="positive multiple"):
        LatentWeights(range_rate=0)
    with pytest.raises(ValueError, match="gain_rate is a positive multiple"):
        LatentWeights(gain_rate=-1.0)
    with pytest.raises(ValueError, match="positive magnitude"):
        LatentWeights(limit=-1.0)


def test_stored_floats_may_be_trained_behind_weights(place, tmp_path):
    made = recipe(Spec(Int(2), PerGroup(32)), tokens=256)
    once, _ = run(place, tmp_path / "once", made)
    tuned = Train(StoredFloats(), OriginalKL(), tokens=256, measures=2, lr=5e-3)
    twice, _ = run(place, tmp_path / "twice", dataclasses.replace(made, stages=(*made.stages, tuned)))
    assert once.kl is not None and twice.kl is not None and twice.kl < once.kl
    assert (tmp_path / "twice" / "training-2.jsonl").exists() and (tmp_path / "twice" / "training-3.jsonl").exists()
