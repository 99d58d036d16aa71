"""Every pair of methods in whole runs, as listed in docs/matrix.md, and the mixes with recipes of their own."""

from __future__ import annotations

import pytest
import torch

import lowbit
from lowbit.numerics import NF4, Int, PerChannel, PerGroup, PerTensor, RmsRange, Spec
from lowbit.recipes import Recipe
from lowbit.scheme import linears
from lowbit.solve import Gptq, LeaveOneOut, WeakColumns
from lowbit.steps import Incoherence, Solve

from helpers import random_ids, sqnr_db, tiny_llama
from matrix import differences, pairs, places, read_page, whole_mixes

PLACES, WHOLE = places(), whole_mixes()


def test_every_pair_has_a_place_and_every_architecture_has_pairs():
    assert sorted(name for names in PLACES.values() for name in names) == sorted(pairs()) == sorted(read_page()[1])
    assert min(len(names) for names in PLACES.values()) >= 15


@pytest.mark.slow
@pytest.mark.parametrize("case", PLACES)
def test_every_pair_runs_end_to_end_on_an_architecture_or_is_refused_with_its_reason(case, tmp_path):
    assert not differences(case, PLACES[case], tmp_path, WHOLE)


OWN = {
    "SpQR outliers in NF4": Recipe.blockwise(
        name="outliers in NF4",
        scheme=linears(Spec(NF4, PerGroup(32))),
        steps=(Solve(Gptq(outliers=LeaveOneOut(0.2), order="group")),),
    ),
    "OWQ columns on QuIP's grid": Recipe.blockwise(
        name="columns on a rotated grid",
        scheme=linears(Spec(Int(4, zero="real"), PerTensor())),
        steps=(Incoherence(), Solve(Gptq(RmsRange(2.5), outliers=WeakColumns(count=4)))),
    ),
    "SpQR outliers and OWQ columns together": Recipe.blockwise(
        name="outliers and columns",
        scheme=linears(Spec(Int(4), PerChannel())),
        steps=(Solve(Gptq(outliers=(WeakColumns(count=2), LeaveOneOut(0.5)))),),
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_parts_of_methods_combine_in_a_recipe_of_ones_own(name, tmp_path):
    path, ids = tiny_llama(tmp_path / "model"), random_ids(4, 32)
    report = lowbit.quantize(path, OWN[name], ids, out=tmp_path / "q", max_kl=50)
    assert report.coverage == 1.0
    with torch.no_grad():
        wanted, found = (lowbit.load(p, torch.float32)(ids).logits for p in (path, tmp_path / "q"))
    assert sqnr_db(wanted, found) > 10
    assert lowbit.load(tmp_path / "q").generate(ids[:1, :4], max_new_tokens=3, do_sample=False).shape == (1, 7)
