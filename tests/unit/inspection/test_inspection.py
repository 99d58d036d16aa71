from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaForCausalLM, MixtralConfig

import lowbit
from lowbit.checkpoints.source import ModelSource
from lowbit.data import Calibration
from lowbit.evaluation import output_error
from lowbit.inspection import InputRow, Inspection, inspect_model
from lowbit.inspection.rows import MASSIVE, OUTLIER, ROUNDED, markdown
from lowbit.numerics import MinMax, quantize

from helpers import random_ids, tiny_llama

WINDOWS, TOKENS = 3, 16


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """A tiny llama with an outlier channel at the first attention input and a massive first token in block 1's MLP.

    Channel 5 of block 0's attention norm is 40 times the others. Token 7, in the first position, opens a gate and an up
    channel that all other tokens leave shut, so only that activation is large.
    """
    path = tiny_llama(tmp_path_factory.mktemp("models") / "planted")
    model = LlamaForCausalLM.from_pretrained(path)
    with torch.no_grad():
        gain = model.model.layers[0].input_layernorm.weight
        gain.fill_(1.0)
        gain[5] = 40.0
        embedding = model.model.embed_tokens.weight
        embedding[:, 0] = 0.0
        embedding[7, 0] = 30.0  # its own direction: nothing else writes there
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        mlp = model.model.layers[1].mlp
        mlp.gate_proj.weight[3] = mlp.up_proj.weight[3] = 0.0
        mlp.gate_proj.weight[3, 0] = mlp.up_proj.weight[3, 0] = 200.0
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    ids = random_ids(WINDOWS, TOKENS)
    ids[ids == 7] = 8
    ids[:, 0] = 7
    return ids


@pytest.fixture(scope="module")
def found(planted, ids) -> Inspection:
    return inspect_model(planted, ids)


@pytest.fixture(scope="module")
def inputs(planted, ids) -> dict[str, torch.Tensor]:
    """The inputs of all linears of the model, from a plain forward pass with hooks."""
    model = LlamaForCausalLM.from_pretrained(planted).eval()
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(name):
        return lambda _, args: seen.setdefault(name, []).append(args[0].detach().flatten(0, -2))

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(keep(name))
    with torch.no_grad():
        for window in ids:
            model(window[None], use_cache=False)
    return {name: torch.cat(parts) for name, parts in seen.items()}


def row(found: Inspection, name: str) -> InputRow:
    return next(row for row in found.inputs if row.name == name)


def test_maxima_and_medians_are_those_of_a_plain_forward_pass(found, inputs):
    assert len(found.inputs) == 2 * 4
    for each in found.inputs:
        x_TI = inputs[each.readers[0]]
        peak_I, peak_T = x_TI.abs().amax(0), x_TI.abs().amax(1)
        assert each.channels == x_TI.shape[1]
        assert each.largest == pytest.approx(peak_I.max().item(), rel=1e-4)
        assert each.median_channel == pytest.approx(peak_I.median().item(), rel=1e-4)
        assert each.median_token == pytest.approx(peak_T.median().item(), rel=1e-4)
        wanted = {i for i in range(len(peak_I)) if peak_I[i] > OUTLIER * peak_I.median()}
        assert {channel for channel, _ in each.outliers} == wanted


def test_a_planted_outlier_channel_is_found_first(found):
    (channel, ratio), *_ = row(found, "model.layers.0.attention_in").outliers
    assert channel == 5 and ratio > 2 * OUTLIER
    ratios = [ratio for _, ratio in row(found, "model.layers.0.attention_in").outliers]
    assert ratios == sorted(ratios, reverse=True)


def test_a_planted_massive_token_is_found_with_its_window_and_position(found):
    massive = row(found, "model.layers.1.mlp_hidden").massive
    assert {(token.window, token.position) for token in massive} == {(w, 0) for w in range(WINDOWS)}
    assert all(token.ratio > MASSIVE for token in massive)
    assert massive[0].magnitude == row(found, "model.layers.1.mlp_hidden").largest
    assert not row(found, "model.layers.0.mlp_in").massive


def test_the_hardest_layers_are_ranked_by_their_rounded_output_error(found, planted, inputs):
    model = LlamaForCausalLM.from_pretrained(planted)
    errors = {}
    for each in found.rows:
        w_OI, x_TI = model.get_submodule(each.name).weight.detach(), inputs[each.name]
        rounded = quantize(w_OI, ROUNDED, MinMax()).dequantize()
        errors[each.name] = output_error(x_TI @ w_OI.T, x_TI @ rounded.T)
        assert each.error == pytest.approx(errors[each.name], rel=1e-3)
        assert (each.weight_min, each.weight_max) == (w_OI.min().item(), w_OI.max().item())
        assert each.weight_std == pytest.approx(w_OI.std().item(), rel=1e-6)
    assert [each.name for each in found.hardest] == sorted(errors, key=lambda name: -errors[name])
    assert len(found.rows) == 14


def test_the_model_is_held_one_block_at_a_time(planted, ids, monkeypatch):
    loaded: list[str] = []
    load, release = ModelSource.load_into, ModelSource.release

    def note_load(self, model, prefix, **options):
        loaded.append(prefix)
        assert len([name for name in loaded if name.startswith("model.layers.")]) <= 1
        return load(self, model, prefix, **options)

    def note_release(self, model, prefix):
        loaded.remove(prefix)
        return release(self, model, prefix)

    monkeypatch.setattr(ModelSource, "load_into", note_load)
    monkeypatch.setattr(ModelSource, "release", note_release)
    inspect_model(planted, ids)
    assert not loaded


def test_tables_plots_and_data_are_written(planted, ids, tmp_path, found):
    steps = []
    out = tmp_path / "new" / "directory"
    written = inspect_model(planted, ids, out=out, progress=lambda *args: steps.append(args))
    assert [step[:2] for step in steps] == [(0, 2), (1, 2)]
    assert (
        {file.name for file in written.files}
        == {
            "inspection.md",
            "inspection.json",
            "channels.safetensors",
            "channel_maxima.png",
            "massive_tokens.png",
            "hardest_layers.png",
        }
        == {file.name for file in out.iterdir()}
    )
    for file in out.glob("*.png"):
        assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 10_000
    assert (written.rows, written.inputs) == (found.rows, found.inputs)
    assert json.loads((out / "inspection.json").read_text()) == json.loads(json.dumps(written.to_dict()))
    channels = load_file(out / "channels.safetensors")
    assert channels["model.layers.0.attention_in"].argmax() == 5
    assert channels.keys() == {row.name for row in written.inputs}


@pytest.mark.parametrize("of", ["directory", "file"])
def test_what_is_there_already_is_left_alone_before_any_work(planted, ids, tmp_path, monkeypatch, of):
    monkeypatch.setattr(ModelSource, "load_into", lambda *_: pytest.fail("weights were read"))
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(ValueError, match=r"choose a(nother| directory with) -o DIR"):
        inspect_model(planted, ids, out=tmp_path if of == "directory" else notes)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"] and notes.read_text() == "mine"


def test_the_table_names_the_worst_of_each_kind(found):
    text = markdown(found)
    hard, wide, tokens = (text.split("## ")[i].splitlines() for i in (1, 2, 3))
    assert hard[6].startswith(f"| {found.hardest[0].name} | {found.hardest[0].error:.3g} |")
    assert any("model.layers.0.attention_in" in line and "5 (" in line for line in wide)
    assert any(line.startswith("| model.layers.1.mlp_hidden | 0, 0 |") for line in tokens)
    calm = markdown(Inspection("m", "t", found.rows, tuple(row for row in found.inputs if not row.massive)))
    assert calm.endswith("None.\n")


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64),
        MixtralConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=8,
            num_experts_per_tok=1,
        ),
    ],
    ids=["transposed weights", "experts"],
)
def test_other_architectures_are_inspected_too(tmp_path, config):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    found = inspect_model(tmp_path / "model", random_ids(1, 6), out=tmp_path / "out")
    per_block = 4 if config.model_type == "gpt2" else 4 + 3 * 8
    assert len(found.rows) == 2 * per_block
    unseen = [row for row in found.rows if row.error is None]
    assert bool(unseen) == (config.model_type == "mixtral")  # six tokens do not reach all eight experts
    assert {row.input for row in unseen}.isdisjoint(row.name for row in found.inputs)
    assert {row.role for row in found.inputs} >= {"attention_in", "attention_out"}
    partial = [row for row in found.inputs if row.role == "expert_in"]
    assert all(token.position is None for row in partial for token in row.massive)


def test_calibration_is_checked_like_that_of_a_run(planted, ids):
    named = inspect_model(planted, Calibration(ids, "my text", "0" * 64))
    assert named.calibration == f"my text, [{WINDOWS}, {TOKENS}]"
    with pytest.raises(ValueError, match=r"from 0 to 127, found .* to 200"):
        inspect_model(planted, ids.masked_fill(ids == 7, 200))
    with pytest.raises(ValueError, match="no tokenizer"):
        inspect_model(planted, "python-docs")
    with pytest.raises(ValueError, match="already quantized"):
        config = json.loads((planted / "config.json").read_text())
        copy = planted.with_name("quantized")
        copy.mkdir()
        (copy / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
        (copy / "model.safetensors").write_bytes((planted / "model.safetensors").read_bytes())
        inspect_model(copy, ids)


def test_the_model_can_write_its_own_text(planted):
    found = inspect_model(planted, "self", samples=1, seq_len=8)
    assert found.calibration == "self (seed 0), [1, 8]"


# A checkpoint


def packed(planted, ids, place: Path, recipe) -> Inspection:
    lowbit.quantize(planted, recipe, ids, out=place / "packed", max_kl=50)
    return inspect_model(place / "packed", ids, out=place / "after")


def test_a_checkpoint_reads_what_the_original_read_where_nothing_changes_inputs(planted, ids, found, tmp_path):
    after = packed(planted, ids, tmp_path, lowbit.recipe("rtn", bits=8, group_size=32))
    assert [each.name for each in after.inputs] == [each.name for each in found.inputs]
    assert [(each.name, each.shape) for each in after.rows] == [(each.name, each.shape) for each in found.rows]
    first, before = row(after, "model.layers.0.attention_in"), row(found, "model.layers.0.attention_in")
    assert first.largest == pytest.approx(before.largest, rel=1e-4)  # the first block's inputs pass no packed weight
    assert first.outliers[0][0] == before.outliers[0][0]
    assert row(after, "model.layers.1.mlp_hidden").massive[0].position == 0
    assert all(each.error is None for each in after.rows)
    channels = load_file(tmp_path / "after" / "channels.safetensors")
    assert channels["model.layers.0.attention_in"].max() == first.largest


def test_where_no_layer_has_an_error_no_layers_are_called_the_hardest(planted, ids, tmp_path):
    after = packed(planted, ids, tmp_path, lowbit.recipe("rtn", bits=8, group_size=32))
    assert not after.hardest and {row.name for row in after.rows}
    assert {file.name for file in after.files} == {file.name for file in (tmp_path / "after").iterdir()}
    assert "hardest_layers.png" not in {file.name for file in after.files}
    text = (tmp_path / "after" / "inspection.md").read_text()
    assert "Hardest" not in text and "## Widest inputs" in text


def test_smoothing_shows_in_what_packed_weights_read(planted, ids, found, tmp_path):
    after = packed(planted, ids, tmp_path, lowbit.recipe("smoothquant", bits=8, activation_bits=8))
    ratio = {name: each.largest / each.median_channel for name, each in (
        ("before", row(found, "model.layers.0.attention_in")), ("after", row(after, "model.layers.0.attention_in"))
    )}  # fmt: skip
    assert ratio["after"] < ratio["before"] / 2


def test_weights_that_another_tool_packed_are_inspected_as_the_checkpoint_that_they_make(planted, ids, tmp_path):
    after = packed(planted, ids, tmp_path, lowbit.recipe("rtn", bits=8, group_size=32))
    lowbit.export(tmp_path / "packed", "gptq", out=tmp_path / "theirs")
    theirs = inspect_model(tmp_path / "theirs", ids)
    assert theirs.model == "theirs" and all(each.error is None for each in theirs.rows)
    assert row(theirs, "model.layers.1.mlp_hidden").largest == pytest.approx(
        row(after, "model.layers.1.mlp_hidden").largest, rel=1e-5
    )
