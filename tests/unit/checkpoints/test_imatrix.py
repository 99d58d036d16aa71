"""Importance matrices: both layouts of llama.cpp, field by field; what a run without text makes of them; what is refused."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import lowbit
from lowbit.checkpoints.imatrix import Imatrix, is_imatrix, read_imatrix, write_imatrix
from lowbit.checkpoints.shards import ModelError
from lowbit.cli import app
from lowbit.inspection import importance_matrix
from lowbit.job import prepare
from lowbit.modules import QuantLinear
from lowbit.numerics import ClipSearch, Gram, SquareSum, mean_square, quantize

from helpers import random_ids, tiny_llama

IDS = random_ids(3, 16)
Q0, DOWN1 = "blk.0.attn_q.weight", "blk.1.ffn_down.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("imatrix") / "model", intermediate_size=128)


@pytest.fixture(scope="module")
def files(model) -> dict[str, Path]:
    found = {kind: model.parent / f"own{kind}" for kind in (".gguf", ".dat")}
    for file in found.values():
        importance_matrix(model, IDS, out=file)
    return found


def inputs_of(model: Path, name: str) -> torch.Tensor:
    """What the linear of that name reads, ``[T, I]``."""
    loaded, seen = lowbit.load(model, dtype=torch.float32), []
    loaded.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1)))
    with torch.no_grad():
        loaded(IDS)
    return torch.cat(seen)


def test_the_statistic_is_the_diagonal_of_the_gram_matrix_over_the_tokens():
    x = torch.randn(40, 8, dtype=torch.float32)
    found = SquareSum().update(SquareSum().update(None, x[:7]), x[7:])
    assert found[-1] == 40
    assert torch.allclose(mean_square(found), Gram().merge(x).diagonal() / 40, rtol=1e-6)


def test_the_gguf_file_has_the_fields_that_llama_quantize_reads(model, files):
    reader = gguf.GGUFReader(files[".gguf"])
    assert reader.get_field("general.type").contents() == "imatrix"
    assert reader.get_field("general.architecture") is None
    assert reader.get_field("imatrix.datasets").contents() == ["token ids"]
    assert reader.get_field("imatrix.chunk_count").contents() == 3
    assert reader.get_field("imatrix.chunk_size").contents() == 16
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 2 * 2 * 7
    for name, module in ((Q0, "model.layers.0.self_attn.q_proj"), (DOWN1, "model.layers.1.mlp.down_proj")):
        x = inputs_of(model, module)
        sums, counts = tensors[f"{name}.in_sum2"], tensors[f"{name}.counts"]
        assert sums.tensor_type.name == counts.tensor_type.name == "F32"
        assert list(sums.shape) == [x.shape[1], 1] and list(counts.shape) == [1, 1]  # GGUF names the fastest axis first
        assert counts.data.item() == 48
        assert np.allclose(sums.data[0], x.double().square().sum(0), rtol=1e-4)


def test_the_older_file_is_laid_out_byte_by_byte_as_llama_cpp_reads_it(files):
    data, entries, at = files[".dat"].read_bytes(), {}, 4
    count = struct.unpack_from("<i", data)[0]
    for _ in range(count):
        length = struct.unpack_from("<i", data, at)[0]
        name = data[at + 4 : at + 4 + length].decode()
        chunks, width = struct.unpack_from("<2i", data, at + 4 + length)
        at += 12 + length
        entries[name] = chunks, np.frombuffer(data, "<f4", width, at)
        at += 4 * width
    chunks, length = struct.unpack_from("<2i", data, at)
    assert (chunks, data[at + 8 :]) == (3, b"token ids") and length == 9
    wanted = read_imatrix(files[".gguf"]).entries
    assert entries.keys() == wanted.keys()
    for name, (chunks, values) in entries.items():
        assert chunks == 3  # 48 tokens in chunks of 16
        assert np.allclose(values / chunks, mean_square(wanted[name]), rtol=1e-6)  # what llama-quantize divides


@pytest.mark.parametrize("suffix", [".gguf", ".dat"])
def test_what_is_written_is_read_back(tmp_path, suffix):
    entry = torch.tensor([1.0, 0.0, 0.25, 32.0], dtype=torch.float64)
    write_imatrix(Imatrix({Q0: entry}, ("text",), 2, 16), tmp_path / f"x{suffix}")
    found = read_imatrix(tmp_path / f"x{suffix}")
    assert is_imatrix(tmp_path / f"x{suffix}")
    assert found.datasets == ("text",) and found.chunks == 2
    assert torch.equal(mean_square(found.entries[Q0]), mean_square(entry))


def test_a_file_of_2023_without_a_text_is_read(tmp_path):
    values = struct.pack("<3f", 2.0, 4.0, 8.0)
    (tmp_path / "old.dat").write_bytes(struct.pack("<2i", 1, len(Q0)) + Q0.encode() + struct.pack("<2i", 2, 3) + values)
    found = read_imatrix(tmp_path / "old.dat")
    assert found.datasets == () and torch.equal(mean_square(found.entries[Q0]), torch.tensor([1.0, 2.0, 4.0]))


RTN = {"bits": 3, "group_size": 32, "symmetric": True, "importance": True}


@pytest.mark.parametrize("suffix", [".gguf", ".dat"])
def test_a_run_on_the_file_weighs_errors_by_the_mean_squares_in_it(model, files, tmp_path, suffix):
    report = lowbit.quantize(model, lowbit.recipe("rtn", **RTN), str(files[suffix]), out=tmp_path / "out")
    assert f"own{suffix}" in report.calibration
    original, found = lowbit.load(model, dtype=torch.float32), lowbit.load(tmp_path / "out", dtype=torch.float32)
    importance, differ = read_imatrix(files[suffix]).entries, 0
    for name, stored in (("layers.0.self_attn.q_proj", Q0), ("layers.1.mlp.down_proj", DOWN1)):
        w, layer = original.model.get_submodule(name).weight, found.model.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        spec, weight = layer.description.spec, mean_square(importance[stored]).expand_as(w)
        assert torch.equal(layer.dequantize(), quantize(w, spec, ClipSearch(), weight).dequantize())
        differ += not torch.equal(layer.dequantize(), quantize(w, spec, ClipSearch()).dequantize())
    assert differ == 2  # the importance changes scales


def test_text_gives_the_first_block_the_codes_that_the_file_of_that_text_gives_it(model, files, tmp_path):
    for name, given in (("file", str(files[".gguf"])), ("text", IDS)):
        lowbit.quantize(model, lowbit.recipe("rtn", **RTN), given, out=tmp_path / name)
    one, other = (lowbit.load(tmp_path / name).model.layers[0].self_attn.q_proj for name in ("file", "text"))
    assert torch.equal(one.dequantize(), other.dequantize())


def test_the_command_writes_a_file_that_quantize_takes_for_types_of_llama_cpp(model, tmp_path):
    text = tmp_path / "ids.gguf"
    importance_matrix(model, IDS, out=text)
    words = ["quantize", str(model), "--method", "rtn", "--set", "importance=true", "--calibration", str(text)]
    result = CliRunner().invoke(app, [*words, "--format", "gguf:q4_0", "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "importance matrix ids.gguf" in result.output and (tmp_path / "out" / "model.gguf").is_file()


def test_a_file_of_another_model_of_the_same_sizes_is_named_where_it_says_what_read_its_text(model, files, tmp_path):
    other, recipe = tiny_llama(tmp_path / "other", intermediate_size=128, seed=5), lowbit.recipe("rtn", **RTN)

    def said(of: Path, file: Path, out: str) -> list[str]:
        job = prepare(of, recipe, str(file), out=tmp_path / out)
        return [warning for warning in job.warnings if "was made with" in warning]

    (warning,) = said(other, files[".gguf"], "a")
    assert "own.gguf was made with model (fingerprint " in warning and "another model's inputs" in warning
    assert said(model, files[".gguf"], "b") == []
    for kind, file in (("no names", tmp_path / "llama.gguf"), ("older", tmp_path / "llama.dat")):
        found = read_imatrix(files[".gguf"])
        write_imatrix(replace(found, model="", model_sha256=""), file)
        assert read_imatrix(file).model_sha256 == "" and said(other, file, kind) == []  # as llama.cpp writes them


# Refused


def refused(model: Path, file: Path, out: Path, recipe: lowbit.Recipe | None = None) -> str:
    with pytest.raises(ValueError) as error:
        lowbit.quantize(model, recipe or lowbit.recipe("rtn", **RTN), str(file), out=out)
    assert not out.exists()
    return str(error.value)


def changed(files: dict[str, Path], place: Path, **changes: torch.Tensor | None) -> Path:
    """The file with entries replaced, or left out where None."""
    found = read_imatrix(files[".gguf"])
    entries = {**found.entries, **{name.replace("__", "."): value for name, value in changes.items()}}
    write_imatrix(
        Imatrix({name: value for name, value in entries.items() if value is not None}, (), 1, 1), place / "x.gguf"
    )
    return place / "x.gguf"


def test_an_entry_of_another_width_is_refused_with_both_widths(model, files, tmp_path):
    file = changed(files, tmp_path, **{DOWN1: torch.ones(100, dtype=torch.float64)})
    assert f"{DOWN1} has 99 inputs there and 128 here" in refused(model, file, tmp_path / "out")


def test_entries_of_another_model_are_refused_by_name(model, files, tmp_path):
    file = changed(files, tmp_path, **{"blk.7.attn_q.weight": torch.ones(65, dtype=torch.float64)})
    assert "blk.7.attn_q.weight" in refused(model, file, tmp_path / "out")


def test_a_missing_entry_is_refused_by_name(model, files, tmp_path):
    assert f"no entry for {Q0}" in refused(model, changed(files, tmp_path, **{Q0: None}), tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), -1.0])
def test_sums_that_are_no_squares_are_refused(model, files, tmp_path, value):
    file = changed(files, tmp_path, **{Q0: torch.full((65,), value, dtype=torch.float64)})
    assert Q0 in refused(model, file, tmp_path / "out")


def test_an_entry_that_no_token_reached_is_refused(model, files, tmp_path):
    assert "no token reached" in refused(
        model, changed(files, tmp_path, **{Q0: torch.zeros(65, dtype=torch.float64)}), tmp_path / "out"
    )


def test_entries_of_experts_are_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "moe.gguf", "")
    writer.add_type("imatrix")
    writer.add_tensor("blk.0.ffn_up_exps.weight.in_sum2", np.ones((4, 64), np.float32))
    writer.add_tensor("blk.0.ffn_up_exps.weight.counts", np.ones((4, 1), np.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    with pytest.raises(ModelError, match="4 experts"):
        read_imatrix(tmp_path / "moe.gguf")


def test_a_file_that_is_cut_off_is_refused(files, tmp_path):
    data = files[".dat"].read_bytes()
    (tmp_path / "cut.dat").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="cut off"):
        read_imatrix(tmp_path / "cut.dat")


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_method_that_reads_more_than_squares_is_refused(model, files, tmp_path, method):
    recipe = lowbit.recipe(method, bits=4, group_size=32)
    assert "importance=true" in refused(model, files[".gguf"], tmp_path / "out", recipe)


def test_a_method_that_reads_nothing_is_refused(model, files, tmp_path):
    recipe = lowbit.recipe("rtn", bits=4, group_size=32)
    assert "reads none" in refused(model, files[".gguf"], tmp_path / "out", recipe)


def test_a_target_that_exists_or_has_another_suffix_is_refused_before_the_model_is_read(tmp_path):
    (tmp_path / "x.dat").write_bytes(b"")
    for name in ("x.dat", "x.bin"):
        with pytest.raises(ValueError, match=name):
            importance_matrix(tmp_path / "no model", IDS, out=tmp_path / name)
    with pytest.raises(ValueError, match=r"x.dat cannot be written; choose another -o FILE"):
        importance_matrix(tmp_path / "no model", IDS, out=tmp_path / "x.dat" / "x.gguf")


def test_directories_that_lead_to_the_file_are_made(model, tmp_path):
    importance_matrix(model, IDS, out=tmp_path / "new" / "x.gguf")
    assert (tmp_path / "new" / "x.gguf").stat().st_size > 0
