"""Units of a run become few shards, byte for byte, and a kill at any moment loses none of them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.checkpoints.shards import INDEX, WEIGHTS, join_tensors, read_shard_header
from lowbit.stages import merge as merging
from lowbit.stages.journal import Journal

from helpers import random_ids, tiny_llama

UNIT = 1000  # floats


def _journal(place, units=7):
    journal = Journal(place / "out", {"recipe": "a"})
    journal.open()
    section = journal.section(0)
    for i in range(len(section.finished), units):
        section.write(section.unit_name(i, units), _tensors(i), {"i": i})
    return journal, section


def _tensors(i):
    values = torch.arange(UNIT).float() + i
    return {
        f"b{i}.codes": values[: UNIT // 2],
        f"b{i}.half": values[: UNIT // 2].half(),
        f"b{i}.more": values[UNIT // 2 : 3 * UNIT // 4],
    }


def _hashes(place):
    return {
        str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in place.rglob("*")
        if path.is_file()
    }


def test_joined_tensors_are_what_they_were_and_aligned(tmp_path):
    tensors = {
        "b": torch.arange(7, dtype=torch.uint8),
        "a": torch.arange(6).view(2, 3),
        "é": torch.tensor(1.5, dtype=torch.bfloat16),
        "c": torch.ones(3, dtype=torch.float16),
    }
    for name, tensor in tensors.items():
        save_file({name: tensor}, tmp_path / name)
    headers = {name: read_shard_header(tmp_path / name)[name] for name in tensors}
    join_tensors(tmp_path / "joined", headers)
    found = load_file(tmp_path / "joined")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert all(not each.start % each.dtype.itemsize for each in read_shard_header(tmp_path / "joined").values())
    join_tensors(tmp_path / "guarded", headers, "z")
    assert load_file(tmp_path / "guarded")["z"].shape == (0,)


@pytest.mark.parametrize(("limit", "counts"), [(10**6, [7]), (9000, [2, 2, 2, 1]), (4000, [1] * 7), (3000, [1] * 14)])
def test_units_fill_shards_in_order_up_to_the_limit(tmp_path, limit, counts):
    journal, section = _journal(tmp_path)
    names = merging.merge(section, "guard", limit)
    shards = [load_file(journal.directory / name) for name in names]
    assert len(names) == len(counts) and (names == [WEIGHTS]) == (len(counts) == 1)
    for shard in shards:
        assert sum(tensor.nbytes for tensor in shard.values()) <= limit
    if limit >= 4000:
        assert [sum("codes" in name for name in shard) for shard in shards] == counts
    assert ["guard" in shard for shard in shards] == [False] * (len(names) - 1) + [True]
    for i in range(7):
        read = section.tensors(i, f"b{i}.")
        assert read.keys() == _tensors(i).keys()
        assert all(torch.equal(read[name], tensor) for name, tensor in _tensors(i).items())
    assert {path.name for path in journal.directory.iterdir()} == {*names, "journal.jsonl", "lock-holder"}
    assert merging.merge(section, "guard", limit) == names


@pytest.mark.parametrize("limit", [10**6, 9000, 3000])
def test_a_merge_that_is_stopped_anywhere_ends_in_the_same_files(tmp_path, monkeypatch, limit):
    (tmp_path / "whole").mkdir()
    journal, section = _journal(tmp_path / "whole")
    merging.merge(section, "guard", limit)
    journal.close()
    whole, stops = _hashes(tmp_path / "whole"), 0
    for act in range(200):
        place = tmp_path / str(act)
        place.mkdir()
        journal, section = _journal(place)
        with monkeypatch.context() as patch:
            _stop_before(act, patch)
            try:
                merging.merge(section, "guard", limit)
                finished = True
            except KeyboardInterrupt:
                finished = False
        journal.close()
        stops += not finished
        journal, section = _journal(place)
        assert len(journal.finished) == 7
        merging.merge(section, "guard", limit)
        journal.close()
        assert _hashes(place) == whole
        if finished:
            break
    assert stops > 8


def _stop_before(act, patch):
    """Raises before thing number ``act`` that a merge does to files."""
    done = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal done
            if done == act:
                raise KeyboardInterrupt
            done += 1
            return function(*args, **kwargs)

        return call

    patch.setattr(os, "replace", counted(os.replace))
    patch.setattr(os, "fsync", counted(os.fsync))
    patch.setattr(Path, "replace", counted(Path.replace))
    patch.setattr(Path, "unlink", counted(Path.unlink))
    patch.setattr(merging, "join_tensors", counted(merging.join_tensors))


def test_a_damaged_shard_costs_its_units_and_those_after_them(tmp_path):
    journal, section = _journal(tmp_path)
    names = merging.merge(section, None, 9000)
    whole = {name: (journal.directory / name).read_bytes() for name in names}
    journal.close()
    (journal.directory / names[1]).write_bytes(b"broken")
    again = Journal(tmp_path / "out", {"recipe": "a"})
    assert again.open() == 2
    again.close()
    journal, section = _journal(tmp_path)
    assert merging.merge(section, None, 9000) == names
    assert whole == {name: (journal.directory / name).read_bytes() for name in names}


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_a_run_stopped_while_it_checks_what_it_merged_continues_to_the_same_bytes(tmp_path, monkeypatch, method):
    model, ids = tiny_llama(tmp_path / "model", blocks=3), random_ids(3, 16)
    monkeypatch.setattr(merging, "SHARD_BYTES", 50_000)

    def run(name):
        return lowbit.quantize(model, method, ids if method == "gptq" else None, out=tmp_path / name, max_kl=50)

    def stop(*_):
        raise KeyboardInterrupt

    run("whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("lowbit.pipeline._check_reloaded", stop)
        run("again")
    run("again")
    assert _hashes(tmp_path / "again") == _hashes(tmp_path / "whole")
    assert (
        len(list((tmp_path / "whole").glob("model-*-of-*.safetensors"))) > 1 and (tmp_path / "whole" / INDEX).exists()
    )


def test_a_small_result_is_one_file_that_both_loaders_read(tmp_path):
    model = tiny_llama(tmp_path / "model")
    lowbit.quantize(model, "rtn", None, out=tmp_path / "q")
    assert sorted(path.name for path in (tmp_path / "q").glob("*.safetensors*")) == [WEIGHTS, INDEX]
    ids = random_ids(1, 8)
    ours = lowbit.load(tmp_path / "q", torch.float32)(ids).logits
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)(ids).logits
    assert torch.equal(ours, theirs)
