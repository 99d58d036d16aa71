"""Training of terms beside frozen codes, low-rank ones and kept columns: what is computed is what is stored, and gradients are those of plain torch."""

from __future__ import annotations

import json

import pytest
import torch

import lowbit
from lowbit.data import Calibration
from lowbit.modules import QuantLinear
from lowbit.numerics import LowRank
from lowbit.recipes import Recipe, Train
from lowbit.stages import descent
from lowbit.steps import Solve
from lowbit.training import Cosine, KeptColumnValues, LowRankTerms, NextToken, OriginalKL, TrainedModel, replaced
from lowbit.training.side_terms import _Linear
from unit.training.test_latent_weights import stored_logits, tensors

from helpers import assert_same, random_ids, tiny_llama

QUIET = {"max_kl": 50.0, "allow_broken": True}
BASES = {
    "nf4": {},
    "rotations at run time": {"base": "quip", "bits": 4},
    "sparse outliers": {"base": "spqr", "start": "residual"},
    "quantized inputs": {"base": "smoothquant+gptq", "bits": 8, "start": "calibrated"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("low_rank") / "model", blocks=1, dtype=torch.bfloat16)


def text() -> Calibration:
    """One window again and again: something that can be learned."""
    ids = random_ids(1, 32).expand(20, -1).contiguous()
    return Calibration(ids[:4], "a text", "0", held_out=ids[4:6], further=ids[6:])


def recipe(**changes) -> Recipe:
    options = {"tokens": 448, "batch": 2, "accumulate": 2, "measures": 2, "rank": 4, "alpha": 8, "lr": 5e-3}
    return lowbit.recipe("qlora", **{**options, **changes})


def course(out, stage: int = 2) -> list[dict]:
    return [json.loads(line) for line in (out / f"training-{stage}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", BASES)
def test_the_model_in_training_computes_what_the_checkpoint_computes_bit_for_bit(name, place, tmp_path, monkeypatch):
    seen, commit = {}, TrainedModel.commit

    def watched(self):
        with self, torch.no_grad(), replaced(self.model, self.replaced()):
            seen["logits"] = self.model(input_ids=random_ids(2, 24, seed=5), use_cache=False).logits
        commit(self)

    monkeypatch.setattr(TrainedModel, "commit", watched)
    lowbit.quantize(place, recipe(**BASES[name]), text(), out=tmp_path / "out", **QUIET)
    assert_same(stored_logits(tmp_path / "out"), seen["logits"])
    held_out = [row["held_out_loss"] for row in course(tmp_path / "out") if row["held_out_loss"] is not None]
    assert len(held_out) == 3 and held_out[-1] < held_out[0] - 0.1
    assert all(row["held_out_kl"] is None for row in course(tmp_path / "out"))


def test_only_the_terms_are_trained(place, tmp_path):
    for tokens in (0, 448):
        lowbit.quantize(place, recipe(tokens=tokens), text(), out=tmp_path / str(tokens), **QUIET)
    old, new = tensors(tmp_path / "0"), tensors(tmp_path / "448")
    assert old.keys() == new.keys()
    changed = {name.rpartition(".")[2] for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"side0_a", "side0_b"}


@pytest.mark.parametrize("activation_bits", [16, 8])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_gradients_are_those_of_plain_torch(activation_bits, dropout):
    torch.manual_seed(0)
    base = (
        lowbit.recipe("spqr", bits=3) if activation_bits == 16 else lowbit.recipe("smoothquant+rtn", activation_bits=8)
    )
    linear, x = torch.nn.Linear(64, 48), torch.randn(9, 64)
    made = lowbit.recipe("qlora").steps[-1].adapter
    steps = (*base.steps[:-1], Solve(base.steps[-1].solver, adapter=made))
    layer = lowbit.quantize_linear(linear, torch.randn(200, 64), base.with_blockwise(steps=steps))
    term = next(each for each in layer.side_terms if isinstance(each, LowRank))
    term.b.copy_(torch.randn(term.b.shape) * 0.1)
    layer.restore()
    trained = _Linear(layer, LowRankTerms(2.0).scales, dropout)
    a, b = trained.leaves
    assert_same(b.detach(), term.b.float() / 2)
    x.requires_grad_()
    weights = torch.randn(9, 48)
    torch.manual_seed(5)
    with trained:
        y = layer(x)
    ours = torch.autograd.grad((y * weights).sum(), [x, a, b])
    torch.manual_seed(5)
    h = layer._through("pre", x)
    seen = torch.nn.functional.dropout(h, dropout)
    frozen = layer.qtensor().dequantize() + sum(
        t.dense((48, 64)) for t in layer.side_terms if not isinstance(t, LowRank)
    )
    read = h if layer.act is None else trained.read(h)
    plain = read @ frozen.T + (seen @ a.T) @ (2 * b).T + layer.bias
    torch.testing.assert_close(y, plain, rtol=1e-4, atol=1e-4)
    for one, two in zip(ours, torch.autograd.grad((plain * weights).sum(), [x, a, b]), strict=True):
        assert two.any()
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


def test_no_weight_and_no_gradient_of_its_size_is_kept():
    made = lowbit.recipe("qlora")
    made = Recipe("start", made.scheme, made.stages[:1])
    layer = lowbit.quantize_linear(torch.nn.Linear(64, 48), torch.randn(99, 64), made)
    trained, kept = _Linear(layer, LowRankTerms().scales, 0.0), []
    with trained, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(torch.randn(3, 64, requires_grad=True))
    assert max(kept) < 64 * 48


def test_a_run_with_dropout_that_was_killed_ends_in_the_same_bytes(place, tmp_path, monkeypatch):
    monkeypatch.setattr(descent, "SAVE_SECONDS", 0.0)
    made = recipe(dropout=0.2, batch=1)
    lowbit.quantize(place, made, text(), out=tmp_path / "whole", **QUIET)

    def stop(done, total, what):
        if what.startswith("training, step 3 "):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lowbit.quantize(place, made, text(), out=tmp_path / "killed", progress=stop, **QUIET)
    torch.manual_seed(77)  # what else was drawn meanwhile does not matter
    lowbit.quantize(place, made, text(), out=tmp_path / "killed", **QUIET)
    whole, killed = (tensors(tmp_path / name) for name in ("whole", "killed"))
    assert not [name for name in whole if not torch.equal(whole[name], killed[name])]


def test_terms_of_other_methods_can_be_trained_too(place, tmp_path):
    base = lowbit.recipe("qllm", threshold_steps=3, windows=1, epochs=1)
    train = Train(LowRankTerms(), OriginalKL(), tokens=256, lr=3e-3, measures=2)
    made = Recipe("both", base.scheme, (*base.stages, train))
    lowbit.quantize(place, made, text(), out=tmp_path / "out", **QUIET)
    measured = [row["held_out_kl"] for row in course(tmp_path / "out") if row["held_out_kl"] is not None]
    assert min(measured) < measured[0]
    assert any(isinstance(m, QuantLinear) and m.side_terms for m in lowbit.load(tmp_path / "out").modules())


def test_kept_columns_are_trained_alone_and_stored_as_they_were_trained(place, tmp_path, monkeypatch):
    base = lowbit.recipe("owq", bits=4, kept_columns=3)
    settings = {"lr": 2e-2, "batch": 2, "schedule": Cosine(), "measures": 2, "judge": "objective"}
    for tokens in (0, 448):
        train = Train(KeptColumnValues(), NextToken(), tokens=tokens, **settings)
        made = Recipe("columns", base.scheme, (*base.stages, train))
        lowbit.quantize(place, made, text(), out=tmp_path / str(tokens), **QUIET)
    old, new = tensors(tmp_path / "0"), tensors(tmp_path / "448")
    assert {name.rpartition(".")[2] for name in old if not torch.equal(old[name], new[name])} == {"side0_value"}
    held_out = [row["held_out_loss"] for row in course(tmp_path / "448") if row["held_out_loss"] is not None]
    with torch.no_grad():
        model = lowbit.load(tmp_path / "448", torch.float32)
        ids = text().held_out
        assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(min(held_out), rel=1e-4)
    assert min(held_out) < held_out[0] - 0.05


def test_training_terms_that_nothing_leaves_is_refused_before_any_work():
    base = lowbit.recipe("rtn")
    with pytest.raises(ValueError, match=r"no stage before it leaves any; give Solve an adapter"):
        Recipe("none", base.scheme, (*base.stages, Train(LowRankTerms(), NextToken())))
    with pytest.raises(ValueError, match="dropout a share"):
        LowRankTerms(dropout=1.0)
