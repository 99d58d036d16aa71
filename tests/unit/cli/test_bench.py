"""`lowbit bench`: what it prints is there and sensible; how fast this machine is is not tested."""

from __future__ import annotations

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from lowbit.cli import app
from lowbit.evaluation import kernels
from lowbit.kernels import native
from lowbit.modules import QuantLinear


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(kernels, "POOL_BYTES", 2**20)
    monkeypatch.setattr(kernels, "ROUNDS", 2)


def run(*arguments: str):
    return CliRunner().invoke(app, ["bench", *arguments])


def test_kernels_are_measured_for_every_shape_width_and_number_of_tokens(tmp_path):
    out = tmp_path / "new" / "kernels.json"
    result = run("--kernels", "--shapes", "64x256,96x128", "--bits", "8,3", "--rows", "1,16", "--json", "-o", str(out))
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert json.loads(out.read_text()) == found and "share of memory" in out.with_suffix(".md").read_text()
    assert {(k["shape"], k["rows"], k["bits"]) for k in found["kernels"]} == {
        (shape, rows, bits) for shape in ("64x256", "96x128") for rows in (1, 16) for bits in (8, 3)
    }
    for speed in found["kernels"]:
        best = found["machine"]["instruction_sets"][0]
        assert speed["kernel"] == (best if speed["rows"] == 16 else native.MATRIX_TILES.get(best, best))
        for name in ("us", "gb_per_s", "bandwidth_share", "speedup_bf16", "speedup_fp32"):
            assert speed[name] > 0 and math.isfinite(speed[name])


def test_torchs_own_four_bits_are_compared_with_where_they_take_the_shape():
    (four, *_) = kernels.measure_kernels(((64, 256),), (4,))
    assert four.bits == 4 and four.speedup_int4 is not None
    (odd, *_) = kernels.measure_kernels(((60, 250),), (4,))
    assert odd.speedup_int4 is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernels", "--shapes", "4096"], "a shape is OUTxIN such as 4096x11008, or one of llama-7b"),
        (["--kernels", "--shapes", "64x64", "--bits", "4,x"], "bits are whole numbers"),
        ([], "give a model to measure, or --kernels"),
        (["smollm2-135m", "--kernels"], "not both"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments, message):
    result = run(*arguments)
    assert result.exit_code != 0
    assert message in " ".join(result.output.replace("│", " ").split())


def test_a_named_shape_is_every_linear_of_a_block():
    assert kernels.shape_of("llama-7b") == ((4096, 4096), (11008, 4096), (4096, 11008))


@pytest.fixture
def tiny(monkeypatch):
    from lowbit.architectures import shapes

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    named = {"model_type": "llama", "vocab_size": 50, "num_key_value_heads": 2} | sizes
    monkeypatch.setitem(shapes.SHAPES, "tiny", named)
    return shapes.named_config("tiny")


def test_a_random_model_has_the_sizes_and_bits_asked_for_and_runs_by_compiled_kernels(tiny):
    from lowbit.checkpoints.native import bits_per_weight
    from lowbit.evaluation.random_model import linear_shapes, random_model

    assert linear_shapes(tiny) == ((64, 64), (32, 64), (96, 64), (64, 96))
    model = random_model(tiny, 3, 32)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(layers) == 14 and all(layer.tiles is not None for layer in layers)
    assert bits_per_weight(model) == pytest.approx(3 + 19 / 32, abs=0.01)
    assert torch.isfinite(model(torch.arange(9)[None]).logits).all()
    dense = random_model(tiny, 16)
    assert not any(isinstance(module, QuantLinear) for module in dense.modules())
    assert not any(parameter.is_meta for parameter in dense.parameters())
    with pytest.raises(ValueError, match="1 to 8 bits, or 16"):
        random_model(tiny, 12)


def test_a_random_model_is_measured_by_its_name(tiny):
    asked = ["--shapes", "tiny", "--bits", "4", "--group-size", "32", "--prompt-tokens", "8", "--new-tokens", "2"]
    result = run(*asked, "--json")
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["models"]
    assert found["bits"] == 4 and found["decode_tokens_per_s"] > 0
    assert 0 < found["weight_memory"] < found["running_memory"]
    result = run("--shapes", "llama-7c")
    assert result.exit_code != 0 and "did you mean" in " ".join(result.output.replace("│", " ").split())
