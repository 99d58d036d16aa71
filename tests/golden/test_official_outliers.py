"""OWQ and SpQR against what the authors' own code reached on real layers (protocol in `layers.py`).

Two things are asked of each: with the authors' settings, our arithmetic is theirs; as shipped, the output error is at most
1.02 times theirs at the same or fewer bits, where ours count everything that is stored (the protocol's formula for SpQR
leaves row offsets and the order of columns out).

`python tests/golden/test_official_outliers.py` prints the whole table.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.methods.owq import owq
from lowbit.methods.spqr import spqr
from lowbit.modules import QuantLinear
from lowbit.numerics import Gram, KeptColumns, Sparse
from lowbit.recipes import Recipe
from lowbit.solve import Solution

from layers import chosen, gather, missing, official, output_energy

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
OWQ, SPQR = official("OWQ"), official("SpQR")
# Of the settings that differ little, the hardest of each kind is tested; the table has all.
EXTREMES = [r for r in OWQ if "minmax" in r["setting"]]  # the one setting without a search, so the same to four digits
SEARCHED = [r for r in OWQ if "act_order" in r["setting"] or "3.01" in r["setting"]]
DEFAULT = [r for r in SPQR if "script.sh" in r["setting"]]
AS_THEIRS = DEFAULT + [r for r in SPQR if "identity" in r["setting"]]


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return gather()


def _name(record: dict) -> str:
    return f"{record['setting']} {record['layer'].removeprefix('model.layers.')}"


def _solve(record: dict, recipe: Recipe, tensors: dict[str, Tensor]) -> tuple[Solution, float]:
    """Our solution, and its relative output error over the official one."""
    w, seen, unseen = (tensors[f"{record['layer']}.{kind}"] for kind in ("weight", "calibration", "evaluation"))
    (rule,), solver = recipe.scheme.rules, recipe.steps[-1].solver
    solution = solver.solve(w, rule.weight, {Gram(): seen.float()})
    q = solution.q.dequantize()
    for term in solution.side:
        q = q + term.dense((w.shape[0], w.shape[1]))
    for permute in solution.pre:
        q = q[:, permute.index.argsort()]
    return solution, output_energy(w - q, unseen) / output_energy(w, unseen) / record["rel_out"]


def _true_bits(solution: Solution) -> float:
    return QuantLinear.from_qtensor(solution.q, pre=solution.pre, side_terms=solution.side).bits_per_weight


def _kept_columns(record: dict) -> int:
    """Columns that the authors kept, from the record's bits: b + 16 k / I + 32 k / (O I) + 20 / I."""
    linear = record["layer"].rpartition(".")[2]
    rows, columns = {"gate_proj": (1536, 576), "down_proj": (576, 1536)}.get(linear, (576, 576))
    return round((record["bits_per_weight"] - 3 - 20 / columns) / (16 / columns + 32 / (rows * columns)))


def _owq_as_authors(record: dict) -> Recipe:
    return owq(kept_columns=_kept_columns(record), mse=False, order="none", damp=0.01, greedy_passes=0)


def _spqr_as_authors(record: dict) -> Recipe:
    setting = record["setting"]
    return spqr(
        threshold=float("inf") if "thr inf" in setting else 0.2,
        damp=1.0 if "damp1" in setting else 0.01,
        order="act" if "act_order" in setting else "none",
        greedy_passes=0,
    )


def _outlier_bits(solution: Solution) -> float:
    """Bits by the protocol's formula: b + 6/16 + 64/256 + 32 x outlier share."""
    kept = sum(len(term.value) for term in solution.side if isinstance(term, Sparse))
    return 3 + 6 / 16 + 64 / 256 + 32 * kept / (solution.q.shape[0] * solution.q.shape[1])


@pytest.mark.parametrize("record", chosen(EXTREMES), ids=_name)
def test_weak_columns_are_the_authors_to_two_parts_in_a_thousand(record, tensors):
    assert _kept_columns(record) == 8
    assert _solve(record, _owq_as_authors(record), tensors)[1] == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("record", chosen(SEARCHED), ids=_name)
def test_weak_columns_as_shipped_lose_nothing_at_no_more_bits(record, tensors):
    solution, ratio = _solve(record, owq(kept_columns=_kept_columns(record)), tensors)
    assert sum(len(term.index) for term in solution.side if isinstance(term, KeptColumns)) == _kept_columns(record)
    assert ratio <= 1.02 and _true_bits(solution) <= record["bits_per_weight"] + 5e-5  # records have four digits


@pytest.mark.parametrize("record", chosen(AS_THEIRS), ids=_name)
def test_leave_one_out_is_the_authors_to_a_hundredth_in_error_and_bits(record, tensors):
    solution, ratio = _solve(record, _spqr_as_authors(record), tensors)
    # Without outliers one layer is 3 to 4 % better, by the processor: statistics are rounded to 3 bits, and one level more or
    # less moves a group.
    assert (0.95 if "thr inf" in record["setting"] else 0.99) < ratio < 1.011
    assert _outlier_bits(solution) == pytest.approx(record["bits_per_weight"], rel=4e-3)


@pytest.mark.parametrize("record", chosen(DEFAULT), ids=_name)
def test_leave_one_out_as_shipped_is_better_with_every_stored_bit_counted(record, tensors):
    solution, ratio = _solve(record, spqr(), tensors)
    assert ratio <= 1 and _true_bits(solution) <= record["bits_per_weight"]


def _print_table() -> None:
    tensors = gather()
    print("| method | setting | layer | official | bits | as theirs | bits by formula | as shipped | true bits |")
    print("|---|---|---|---|---|---|---|---|---|")
    for record in OWQ + SPQR:
        print(
            "|", record["method"], "|", record["setting"], "|", record["layer"].removeprefix("model.layers."), end=" | "
        )
        print(f"{record['rel_out']:.6g} | {record['bits_per_weight']:.4f}", end=" | ")
        if record["method"] == "OWQ":
            theirs = f"{_solve(record, _owq_as_authors(record), tensors)[1]:.4f} | " if record in EXTREMES else " | "
            shipped, ratio = _solve(record, owq(kept_columns=_kept_columns(record)), tensors)
            print(f"{theirs}| {ratio:.4f} | {_true_bits(shipped):.4f} |")
        else:
            same, as_theirs = _solve(record, _spqr_as_authors(record), tensors)
            shipped, ratio = _solve(record, spqr(), tensors)
            print(f"{as_theirs:.4f} | {_outlier_bits(same):.4f} | {ratio:.4f} | {_true_bits(shipped):.4f} |")


if __name__ == "__main__":
    with torch.inference_mode():
        _print_table()
