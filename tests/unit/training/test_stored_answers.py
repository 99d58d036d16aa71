"""The original's likeliest tokens in place of the original: what is kept, what is lost, and that training goes on with it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import lowbit
from lowbit.data import Calibration
from lowbit.recipes import Recipe, Train
from lowbit.stages import train as stage
from lowbit.training import Answer, ConfidenceKL, HiddenStates, OriginalKL, StoredAnswers, StoredFloats

from helpers import random_ids, tiny_llama

QUIET = {"max_kl": 50.0, "allow_broken": True}
V = 60


def original(i: int) -> Answer:
    return Answer(4 * torch.randn(9, V, generator=torch.Generator().manual_seed(i)))


def test_stored_tokens_keep_their_probabilities_and_the_rest_is_spread_evenly():
    stored = StoredAnswers.of(original, 3, 8)
    for i in range(3):
        wanted, found = original(i).logits_TV.softmax(-1), stored(i).logits_TV.exp()
        torch.testing.assert_close(found.sum(-1), torch.ones(9))
        top = wanted.topk(8, dim=-1)
        torch.testing.assert_close(found.gather(1, top.indices), top.values, rtol=5e-3, atol=1e-4)
        others = found.scatter(1, top.indices, torch.nan)
        assert all(row[~row.isnan()].max() - row[~row.isnan()].min() < 1e-6 for row in others)


def test_what_is_lost_is_the_divergence_from_the_whole_and_falls_with_k():
    def measured(k: int) -> float:
        stored, lost = StoredAnswers.of(original, 3, k), 0.0
        for i in range(3):
            p = original(i).logits_TV.double().log_softmax(-1)
            lost += float((p.exp() * (p - stored(i).logits_TV.double())).sum(-1).mean()) / 3
        assert stored.lost == pytest.approx(lost, rel=1e-4, abs=1e-6)
        return stored.lost

    assert measured(2) > 2 * measured(8) > 4 * measured(32) > 0
    assert measured(V) < 1e-5


def test_answers_are_the_same_from_their_file_and_a_damaged_file_is_none(tmp_path):
    stored = StoredAnswers.of(original, 2, 4)
    stored.save(tmp_path / "answers")
    again = StoredAnswers.load(tmp_path / "answers")
    assert again is not None and again.lost == stored.lost
    assert torch.equal(again(1).logits_TV, stored(1).logits_TV)
    (tmp_path / "answers").write_bytes((tmp_path / "answers").read_bytes()[:50])
    assert StoredAnswers.load(tmp_path / "answers") is None and StoredAnswers.load(tmp_path / "none") is None


@pytest.mark.parametrize("objective", [OriginalKL(), ConfidenceKL()], ids=str)
def test_a_training_asks_the_original_each_window_once_and_says_what_that_loses(objective, tmp_path, monkeypatch):
    place, asked = tiny_llama(tmp_path / "model", blocks=1), []
    answer = stage._Original.answer

    def counted(self, ids_NT, i):
        asked.append(tuple(ids_NT[i].tolist()))
        return answer(self, ids_NT, i)

    monkeypatch.setattr(stage._Original, "answer", counted)
    ids = random_ids(8, 32)
    text = Calibration(ids[:4], "a text", "0", held_out=ids[4:6], further=random_ids(6, 32, seed=3))
    base = lowbit.recipe("rtn", bits=3, group_size=32)
    settings = {"tokens": 384, "lr": 5e-3, "measures": 3, "top_k": 64}
    recipe = Recipe("stored", base.scheme, (*base.stages, Train(StoredFloats(), objective, **settings)))
    report = lowbit.quantize(place, recipe, text, out=tmp_path / "out", **QUIET)
    assert len(asked) == len(set(asked)) == 8
    assert any("64 likeliest tokens, which lie" in note for note in report.warnings)
    rows = [json.loads(line) for line in (tmp_path / "out" / "training-2.jsonl").read_text().splitlines()]
    assert min(row["held_out_kl"] for row in rows if row["held_out_kl"] is not None) < rows[0]["held_out_kl"]
    assert not list((tmp_path / "out").glob("*.answers"))


def test_hidden_states_are_not_kept():
    with pytest.raises(ValueError, match="no hidden states"):
        Train(StoredFloats(), HiddenStates(), top_k=8)
    with pytest.raises(ValueError, match="1 likeliest token or more"):
        replace(Train(StoredFloats(), OriginalKL()), top_k=0)
