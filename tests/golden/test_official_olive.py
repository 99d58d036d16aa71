"""OliVe and ANT against what the authors' code reaches on real layers: 4-bit weights alone, and with 4-bit activations.

Weights see no data. Activations have one static scale, fitted on the first two calibration windows, as in the records; both
are measured on the layer as it runs. Records of activations alone have no recipe here: every recipe quantizes weights.
`python tests/golden/test_official_olive.py` prints the table.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowbit

import layers
from blocks import TESTED, errors_of, place_of

pytestmark = pytest.mark.skipif(layers.missing() is not None, reason=layers.missing() or "")
RECORDS = [r for r in layers.official("OliVe", "ANT(no_outlier)", where=TESTED) if r["setting"] != "A4 only"]


def _name(record: dict) -> str:
    return f"{record['method']} {record['setting'][:4].strip()} {record['layer'].removeprefix('model.layers.')}"


def _ratio(record: dict) -> tuple[float, float]:
    """Our relative output error over the official one; bits per weight, or NaN where the whole block was run."""
    options = {"outliers": record["method"] == "OliVe"}
    if record["setting"] == "W4A4":
        block, path = place_of(record)
        return errors_of("olive", block, **options)[path] / record["rel_out"], float("nan")
    tensors = layers.gather()
    w_OI, unseen = tensors[f"{record['layer']}.weight"], tensors[f"{record['layer']}.evaluation"]
    linear = nn.Linear(w_OI.shape[1], w_OI.shape[0], bias=False)
    linear.load_state_dict({"weight": w_OI})
    q = lowbit.quantize_linear(linear, None, lowbit.recipe("olive", activation_bits=None, **options))
    lost = layers.output_energy(w_OI - q.dequantize(), unseen) / layers.output_energy(w_OI, unseen)
    return lost / record["rel_out"], q.bits_per_weight


@pytest.mark.parametrize("record", RECORDS, ids=_name)
def test_pairs_lose_what_the_authors_code_loses(record):
    ratio, bits = _ratio(record)
    assert ratio < 1.02
    if record["method"] == "OliVe":  # the same numbers but for scales in half precision
        assert ratio > 0.98
    assert not bits > record["bits_per_weight"] + 1e-4


if __name__ == "__main__":
    torch.set_num_threads(1)
    for record in RECORDS:
        print(f"{_name(record):50} {'{:.5f} {:.4f}'.format(*_ratio(record))}", flush=True)
