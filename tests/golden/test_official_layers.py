"""Round to nearest and the column solver against what the authors' own code reached on real layers.

The records give the relative output error on held-out text (protocol in `layers.py`). Three things are asked: that
our arithmetic is the authors' (scales kept in float32, groups placed on stale weights as their code does: the same
error to three or four digits); that as shipped (float16 scales, live groups) nothing is lost; and that the settings
this solver adds at no cost in bits, group order and ranges searched by importance, gain on every layer.

`python tests/golden/test_official_layers.py` prints the whole table.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowbit.numerics import ClipSearch, Gram, Int, MinMax, PerChannel, PerGroup, Spec
from lowbit.solve import Gptq, Nearest, Solver

from layers import LAYERS, chosen, gather, missing, official, output_energy

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
NEAREST, SOLVED = official("RTN"), official("GPTQ")
PLAIN = [r for r in NEAREST if "mse" not in r["setting"]]
SEARCHED = [r for r in NEAREST if "mse" in r["setting"]]
GROUPED = [r for r in SOLVED if r["setting"].endswith("g64")]

# Ranges by extremes of weights that carry more corrections are wider (here by 0.6 % on average), and at 2 bits any
# wider range costs: on most layers one per cent, on these more. A searched range turns the sign (last test below).
WIDER = {
    ("W2 asym g64", "model.layers.2.self_attn.q_proj"),
    ("W2 asym g64 actorder", "model.layers.2.self_attn.q_proj"),
    ("W2 asym g64 actorder", "model.layers.14.self_attn.o_proj"),
}


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return _with_energies(gather())


def _with_energies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    energies = (output_energy(tensors[f"{layer}.weight"], tensors[f"{layer}.evaluation"]) for layer in LAYERS)
    return tensors | {f"{layer}.energy": torch.tensor(e, dtype=torch.float64) for layer, e in zip(LAYERS, energies)}


def _name(record: dict) -> str:
    return f"{record['setting']} {record['layer'].removeprefix('model.layers.')}"


def _spec(record: dict, scale_dtype: str) -> Spec:
    bits, _, granularity = record["setting"].split()[:3]
    assert granularity in ("g64", "per-channel")
    return Spec(Int(int(bits[1:])), PerGroup(64) if granularity == "g64" else PerChannel(), scale_dtype=scale_dtype)


def _solver(record: dict, **options) -> Solver:
    if record["method"] == "RTN":
        return Nearest(ClipSearch() if "mse" in record["setting"] else MinMax())
    return Gptq(order="act" if "actorder" in record["setting"] else "none", **options)


def _ratio(record: dict, solver: Solver, scale_dtype: str, tensors: dict[str, Tensor]) -> float:
    """Our relative output error over the official one."""
    kinds = ("weight", "calibration", "evaluation", "energy")
    w, seen, unseen, energy = (tensors[f"{record['layer']}.{kind}"] for kind in kinds)
    solution = solver.solve(w, _spec(record, scale_dtype), {Gram(): seen.float()})
    assert solution.notes == ()
    q = solution.q.dequantize()
    for permute in solution.pre:
        q = q[:, permute.index.argsort()]
    return output_energy(w - q, unseen) / energy.item() / record["rel_out"]


@pytest.mark.parametrize("record", chosen(NEAREST), ids=_name)
def test_round_to_nearest_is_the_authors_to_four_digits(record, tensors):
    assert _ratio(record, _solver(record), "float32", tensors) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("record", chosen(PLAIN), ids=_name)
def test_half_precision_scales_cost_round_to_nearest_nothing(record, tensors):
    assert _ratio(record, _solver(record), "float16", tensors) == pytest.approx(1, abs=5e-3)


def test_half_precision_scales_cost_searched_ranges_nothing_on_average(tensors):
    ratios = [_ratio(record, _solver(record), "float16", tensors) for record in SEARCHED]
    assert len(ratios) == 16
    assert math.prod(ratios) ** (1 / len(ratios)) == pytest.approx(1, abs=5e-3)


@pytest.mark.parametrize("record", chosen(SOLVED), ids=_name)
def test_the_column_solver_is_the_authors_to_three_digits(record, tensors):
    assert _ratio(record, _solver(record, stale_groups=True), "float32", tensors) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("record", chosen(SOLVED), ids=_name)
def test_the_column_solver_as_shipped_loses_nothing(record, tensors, request):
    if (record["setting"], record["layer"]) in WIDER:
        request.applymarker(pytest.mark.xfail(strict=True, reason="2 bits, extremes: live groups have wider ranges"))
    assert _ratio(record, _solver(record), "float16", tensors) <= 1.02


@pytest.mark.parametrize("record", chosen(GROUPED), ids=_name)
def test_group_order_and_searched_ranges_gain_on_every_layer(record, tensors):
    assert _ratio(record, Gptq(ClipSearch(), order="group"), "float16", tensors) < 0.9


def _print_table() -> None:
    tensors = _with_energies(gather())
    print("| method | setting | layer | official | float32, as theirs | as shipped |")
    print("|---|---|---|---|---|---|")
    for record in NEAREST + SOLVED:
        theirs = {"stale_groups": True} if record["method"] == "GPTQ" else {}
        ratios = (
            _ratio(record, _solver(record, **theirs), "float32", tensors),
            _ratio(record, _solver(record), "float16", tensors),
        )
        cells = (record["method"], record["setting"], record["layer"].removeprefix("model.layers."))
        print("|", " | ".join(cells), f"| {record['rel_out']:.6g} |", " | ".join(f"{r:.4f}" for r in ratios), "|")


if __name__ == "__main__":
    with torch.inference_mode():
        _print_table()
