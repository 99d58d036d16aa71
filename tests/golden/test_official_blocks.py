"""Methods that act on a whole block, against what their authors' code reaches on a block of a real model.

Records of round-to-nearest with quantized activations, SmoothQuant, LLM.int8(), Outlier Suppression+, AWQ, QLLM,
ZeroQuant and RPTQ; protocol as in ``layers.py``. Inputs of the block are gathered once and cached. A method's own error is measured with the packed layer as
it will run.
"""

from __future__ import annotations

import pytest

import layers
from blocks import TESTED, bits_of, errors_of, input_errors_of, place_of

pytestmark = pytest.mark.skipif(layers.missing() is not None, reason=layers.missing() or "")
ACTIVATION_RECORDS = layers.official("RTN W/A", "SmoothQuant", where=TESTED)
INT8_RECORDS = [record for record in layers.official("LLM.int8", where=TESTED) if "threshold" in record["setting"]]
OSPLUS_RECORDS = [
    record for record in layers.official("OS+", where=TESTED) if record["setting"].startswith("W4A4 scale search")
]
TOKEN_RECORDS = [
    r for r in layers.official("ZeroQuant(DS)", where=TESTED) if r["setting"] == "W4 Sym g64 A8 per-token Sym"
]
CLUSTER_RECORDS = [
    r for r in layers.official("RPTQ", where=TESTED) if r["setting"] == "A4 static 32 clusters ema_minmax W16"
]
AWQ_RECORDS = [
    record for record in layers.official("AWQ", where=TESTED) if record["setting"] == "W3 g64 auto_scale+auto_clip"
]

QLLM_RECORDS = [record for record in layers.official("QLLM", where=TESTED) if record["setting"].startswith("W4A4")]


@pytest.mark.parametrize("record", ACTIVATION_RECORDS, ids=lambda r: f"{r['method']} {r['setting'][:4]} {r['layer']}")
def test_quantized_activations_lose_what_the_authors_code_loses(record):
    block, path = place_of(record)
    bits = int(record["setting"][1])
    if record["method"] == "SmoothQuant":
        errors = errors_of("smoothquant", block, bits=bits, activation_bits=bits, alpha=0.5)
    else:
        errors = errors_of("rtn", block, bits=bits, activation_bits=bits, group_size=None, symmetric=True)
    # Scales of weights are stored in half precision here and were not there, so that ties of codes fall differently.
    assert errors[path] == pytest.approx(record["rel_out"], rel=0.02)


@pytest.mark.parametrize("record", INT8_RECORDS, ids=lambda r: f"{r['setting']} {r['layer']}")
def test_channels_taken_out_at_run_time_lose_what_the_authors_code_loses(record):
    block, path = place_of(record)
    threshold = float(record["setting"].split("threshold ")[1].split()[0])
    call = layers.WINDOW if "per window" in record["setting"] else None
    errors = errors_of("llm-int8", block, tokens_a_call=call, threshold=threshold)
    assert errors[path] == pytest.approx(
        record["rel_out"], rel=0.02
    )  # as above; their input is rounded to half precision


@pytest.mark.parametrize("record", AWQ_RECORDS, ids=lambda r: r["layer"])
def test_searched_scales_and_clipping_lose_no_more_than_the_authors_code(record):
    block, path = place_of(record)
    errors = errors_of("awq", block, bits=3, group_size=64)
    assert errors[path] <= 1.02 * record["rel_out"]


@pytest.mark.parametrize("record", OSPLUS_RECORDS, ids=lambda r: r["layer"])
def test_searched_thresholds_lose_no_more_than_the_authors_code(record):
    block, path = place_of(record)
    # The records judge queries, keys and values as plain linears, on the inputs of the unquantized block.
    errors = errors_of("outlier-suppression-plus", block, bits=4, activation_bits=4, by="linears", in_turn=False)
    assert errors[path] <= 1.02 * record["rel_out"]


@pytest.mark.slow
@pytest.mark.parametrize("record", QLLM_RECORDS, ids=lambda r: f"{r['setting'][5:13]} {r['layer']}")
def test_reassembled_channels_lose_no_more_than_the_authors_code(record):
    block, path = place_of(record)
    share = 0.1 if "ratio.1" in record["setting"] else 0.0
    options = {"bits": 4, "activation_bits": 4, "rank": 0, "channel_ratio": share, "attention_output": True}
    assert errors_of("qllm", block, **options)[path] <= 1.02 * record["rel_out"]
    assert bits_of("qllm", block, **options)[path] <= record["bits_per_weight"]


@pytest.mark.parametrize("record", TOKEN_RECORDS, ids=lambda r: r["layer"])
def test_full_symmetric_groups_and_ranges_of_tokens_lose_about_what_the_authors_code_loses(record):
    block, path = place_of(record)
    errors = errors_of("zeroquant", block, bits=4, group_size=64, distil=False)
    # Inputs are in our dialect, which keeps a token's positive extreme: where one channel towers over all, that loses less.
    assert 0.95 * record["rel_out"] <= errors[path] <= 1.02 * record["rel_out"]


@pytest.mark.parametrize("record", CLUSTER_RECORDS, ids=lambda r: r["layer"])
@pytest.mark.parametrize("ranges", ["search", "ema"])
def test_clusters_with_static_ranges_lose_no_more_than_the_authors_code(record, ranges):
    block, path = place_of(record)
    errors = input_errors_of("rptq", block, ranges=ranges, solver="nearest")
    assert errors[path] <= {"search": 0.6, "ema": 1.0}[ranges] * record["rel_out"]
