"""The list of `make identity` is complete, and a difference is seen. Nothing is quantized here."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import lowbit

from identity import compare_files, sha256_of, tensor_differences
from identity_runs import FIVE, LINEAR, MODELS, RUNS, spelled

NAMES = {run["name"]: run for run in RUNS}


def _methods(run) -> set[str]:
    return set() if isinstance(run["recipe"], str) else set(run["recipe"].get("method", "").split("+")) - {""}


def test_the_list_has_at_least_sixty_runs_with_names_of_their_own():
    assert len(NAMES) == len(RUNS) >= 60
    assert not any("/" in name for name in NAMES)  # a name is a directory as well


def test_every_method_runs_on_five_kinds_of_architecture():
    for method in (entry["name"] for entry in lowbit.list_methods()):
        places = {run["model"] for run in RUNS if _methods(run) == {method}}
        assert places >= set(FIVE), f"{method} is missing on {set(FIVE) - places}"
    assert len({MODELS[name][0] for name in FIVE}) == 5


def test_every_special_case_has_runs():
    assert sum(len(_methods(run)) > 1 for run in RUNS) >= 6
    assert sum("model_steps" in run["recipe"] for run in RUNS) >= 2
    assert sum("overrides" in run["recipe"] for run in RUNS) >= 2
    assert sum("scheme" in run["recipe"] for run in RUNS) >= 2
    assert sum(run["windows"] is None and run["model"] != LINEAR for run in RUNS) >= 5
    assert {run["windows"] is None for run in RUNS if run["model"] == LINEAR} == {True, False}
    assert {run["interrupt"]["by"] for run in RUNS if "interrupt" in run} == {"exception", "kill"}
    assert {MODELS[run["model"]][2] for run in RUNS if run["model"] != LINEAR} == {"float32", "bfloat16", "float16"}


def test_a_run_is_plain_data_that_refers_to_what_is_there():
    assert json.loads(json.dumps(RUNS)) == RUNS
    for run in RUNS:
        assert run["model"] in {*MODELS, LINEAR}
        assert run.get("same_as", run["name"]) in NAMES


def test_recipes_are_spelled_as_the_lowbit_at_hand_reads_them():
    for run in RUNS:
        assert spelled(run["recipe"], lowbit.Recipe.__annotations__)
        lowbit.recipes.as_recipe(spelled(run["recipe"], lowbit.Recipe.__annotations__))
    tuned = {"method": "gptq", "model_steps": [{"type": "Tune", "epochs": 2}]}
    assert spelled(tuned, {"name", "model_steps"}) == tuned
    train = {"type": "Train", "what": {"type": "StoredFloats"}, "objective": {"type": "OriginalKL"}, "epochs": 2}
    assert spelled(tuned, {"name", "stages"}) == {"method": "gptq", "then": [train]}
    with pytest.raises(ValueError, match="add the new spelling"):
        spelled(tuned, {"name"})


def test_a_difference_is_named_by_file_and_tensor(tmp_path):
    hashes = []
    for side, change in (("old", 0.0), ("new", 0.5)):
        directory = tmp_path / side / "checkpoint"
        directory.mkdir(parents=True)
        codes = torch.tensor([1, 2, 3 + int(2 * change)], dtype=torch.uint8)
        tensors = {"scale": torch.tensor([[1.0, 2.0 + change]]), "codes": codes, "same": torch.zeros(2)}
        save_file(tensors, directory / "a.safetensors")
        save_file({"x": torch.zeros(3)}, directory / "b.safetensors")
        files = sorted(directory.glob("*"))
        hashes.append({file.name: sha256_of(file.read_bytes()) for file in files} | {f"{side}.safetensors": ""})
    result = compare_files(hashes[0], hashes[1], (tmp_path / "old", tmp_path / "new"), ("BASE", "HEAD"))
    assert (result.identical, result.different, result.missing) == (1, 1, 2)
    assert result.lines == [
        "a.safetensors: differs",
        "  codes: 1 of 3 values of torch.uint8",
        "  scale: 1 of 2 values of torch.float32, by up to 0.5",
        "new.safetensors: missing in BASE",
        "old.safetensors: missing in HEAD",
    ]


def test_tensors_of_other_names_and_shapes_are_named_and_the_sign_of_zero_counts(tmp_path):
    save_file({"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(())}, tmp_path / "old")
    save_file({"a": -torch.zeros(2), "b": torch.zeros(3), "d": torch.zeros(())}, tmp_path / "new")
    assert tensor_differences(tmp_path / "old", tmp_path / "new") == [
        "a: 2 of 2 values of torch.float32, by up to 0",
        "b: torch.float32 [2] in BASE, torch.float32 [3] in HEAD",
        "c: only in BASE",
        "d: only in HEAD",
    ]
