"""QLoRA as a method: its options, and the three ways in which its result is kept."""

from __future__ import annotations

import pytest
import torch

import lowbit
from lowbit.modules import QuantLinear
from lowbit.numerics import NF4, Flat
from lowbit.training import LowRankTerms
from unit.training.test_side_terms import recipe, text

from helpers import random_ids, tiny_writer

QUIET = {"max_kl": 50.0, "allow_broken": True}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=random_ids(2, 9)).logits


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    place = tmp_path_factory.mktemp("qlora")
    tiny_writer(place / "model")
    lowbit.quantize(place / "model", recipe(tokens=1792, lr=1e-2), text(), out=place / "q", **QUIET)
    return place / "q"


def test_the_base_is_nf4_with_double_quantization_or_any_other_methods():
    made = lowbit.recipe("qlora", rank=8, alpha=4.0, dropout=0.1, targets="q, mlp")
    spec = made.scheme.rules[0].weight
    assert spec is not None and spec.grid == NF4 and spec.granularity == Flat(64) and spec.stats is not None
    assert made.stages[-1].what == LowRankTerms(0.5, 0.1) and made.steps[-1].adapter.targets == ("q", "mlp")
    other = lowbit.recipe("qlora", base="awq+gptq", bits=3, group_size=32)
    base = lowbit.recipe("awq+gptq", bits=3, group_size=32)
    assert other.scheme == base.scheme and other.steps[:-1] == base.steps[:-1]
    assert other.steps[-1].solver == base.steps[-1].solver and other.feed == base.feed
    with pytest.raises(ValueError, match="NF4 has 4 bits, found 3; choose another base"):
        lowbit.recipe("qlora", bits=3)
    with pytest.raises(ValueError, match="no method 'gtpq'"):
        lowbit.recipe("qlora", base="gtpq")


def test_the_checkpoint_is_base_and_adapter_in_one_and_transformers_reads_it(trained):
    from transformers import AutoModelForCausalLM

    model = lowbit.load(trained, torch.float32)
    adapted = [m for m in model.modules() if isinstance(m, QuantLinear) and m.description.side_terms]
    assert len(adapted) == 14 and all(part.b.any() for m in adapted for part in m.side_terms)
    again = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(model))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_pefts_own_files_beside_the_base_give_the_same_model(trained, tmp_path):
    peft = pytest.importorskip("peft")
    lowbit.export(trained, "peft", out=tmp_path / "out")
    assert {p.name for p in (tmp_path / "out" / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    base = lowbit.load(tmp_path / "out", torch.float32)
    assert not any(m.side_terms for m in base.modules() if isinstance(m, QuantLinear))
    wanted, plain = logits(lowbit.load(trained, torch.float32)), logits(base)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)
    assert (plain - wanted).norm() > 0.1 * wanted.norm()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_run_writes_pefts_files_at_once(tmp_path):
    pytest.importorskip("peft")
    place = tiny_writer(tmp_path / "model")
    report = lowbit.quantize(place, recipe(tokens=64), text(), out=tmp_path / "out", format="peft", **QUIET)
    assert report.out == tmp_path / "out" and (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()
    with pytest.raises(ValueError, match="no layer has low-rank terms"):
        lowbit.quantize(place, "rtn", None, out=tmp_path / "none", format="peft")


def test_merging_puts_the_terms_into_the_codes_and_says_what_that_loses(trained, tmp_path):
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 97 + 8}" for i in range(3000)))
    asked = {"text": str(tmp_path / "text.txt"), "samples": 3, "seq_len": 20}
    report = lowbit.merge_adapter(trained, None, tmp_path / "merged", **asked)
    assert report.layers == 14 and 0 < report.kl < report.adapter_kl
    merged = lowbit.load(tmp_path / "merged", torch.float32)
    assert not any(m.side_terms for m in merged.modules() if isinstance(m, QuantLinear))
    with pytest.raises(ValueError, match="stores no low-rank terms"):
        lowbit.merge_adapter(tmp_path / "merged", None, tmp_path / "again", **asked)
