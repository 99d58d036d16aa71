"""Training stages on checkpoints that are packed already, and recipes whose methods train behind others."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import lowbit
from lowbit.checkpoints import native
from lowbit.data import Calibration
from lowbit.recipes import Recipe, Train
from lowbit.retraining import prepare_training
from lowbit.stages import descent
from lowbit.training import LatentWeights, NextToken, OriginalKL, StoredFloats

from helpers import SOURCES, launched_twice, random_ids, tiny_llama

QUIET = {"max_kl": 50.0, "allow_broken": True}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("retraining") / "model")


@pytest.fixture(scope="module")
def packed(place):
    """Checkpoints of methods by name."""
    made = {
        "gptq": lowbit.recipe("gptq", bits=3, group_size=32),
        "awq": lowbit.recipe("awq", bits=2, group_size=32, grid=4),
        "qlora": lowbit.recipe("qlora", tokens=0, rank=4),
    }
    for name, recipe in made.items():
        lowbit.quantize(place, recipe, text(), out=place.parent / name, **QUIET)
    return {name: place.parent / name for name in made}


def text(further: int = 24) -> Calibration:
    ids = random_ids(8, 32)
    return Calibration(ids[:4], "a text", "0", held_out=ids[4:6], further=random_ids(further, 32, seed=3))


def tensors(out) -> dict[str, torch.Tensor]:
    return {name: t for shard in out.glob("*.safetensors") for name, t in load_file(shard).items()}


def changed(a, b) -> set[str]:
    """The last parts of the names of tensors that differ."""
    old, new = tensors(a), tensors(b)
    assert old.keys() == new.keys()
    return {name.rpartition(".")[2] for name in old if not torch.equal(old[name], new[name])}


# Stages alone


@pytest.mark.parametrize(
    ("base", "recipe", "moved"),
    [
        ("gptq", lambda: lowbit.recipe("efficientqat", objective="original", lr=1e-2), {"scale"}),
        ("awq", lambda: lowbit.recipe("bitdistiller", lr=3e-3), {"codes", "scale", "zero"}),
        ("qlora", lambda: lowbit.recipe("qlora", rank=4, lr=5e-3), {"side0_a", "side0_b"}),
    ],
    ids=["efficientqat after gptq", "bitdistiller after awq", "qlora after its start"],
)
def test_a_stage_alone_trains_what_a_checkpoint_stores(base, recipe, moved, place, packed, tmp_path):
    made = recipe().with_training(tokens=768, batch=2, accumulate=1, measures=4)
    report = lowbit.train(packed[base], made, text(), out=tmp_path / "out", against=place)
    assert changed(packed[base], tmp_path / "out") == moved
    assert report.kl is not None and report.kl_before is not None
    if made.stages[-1].judge == "original":
        assert report.kl < report.kl_before
    config = [json.loads((where / "config.json").read_text()) for where in (packed[base], tmp_path / "out")]
    assert config[0] == config[1]
    with torch.no_grad():
        loss = lowbit.load(tmp_path / "out", torch.float32)(
            input_ids=random_ids(8, 32)[4:6], labels=random_ids(8, 32)[4:6]
        ).loss
    assert loss.item() == pytest.approx(report.loss, rel=1e-4)
    said = json.loads((tmp_path / "out" / "lowbit-report.json").read_text())
    assert said["training"]["kl"] == report.kl and said["before"]["kl"] is not None


def test_a_training_that_makes_the_model_worse_says_so_and_is_undone_where_it_is_measured(place, packed, tmp_path):
    gptq = lowbit.recipe("gptq", bits=3, group_size=32)
    unmeasured = Train(StoredFloats(), OriginalKL(), lr=0.5, epochs=2, measures=0)
    reckless = replace(gptq, stages=(*gptq.stages, unmeasured))
    report = lowbit.train(packed["gptq"], reckless, text(), out=tmp_path / "worse", against=place)
    assert report.kl is not None and report.kl_before is not None and report.kl > report.kl_before
    assert any(
        "made the model worse" in warning and "smaller lr (it was 0.5)" in warning for warning in report.warnings
    )
    report = lowbit.train(
        packed["gptq"],
        replace(reckless, stages=(*gptq.stages, replace(unmeasured, measures=None))),
        text(),
        out=tmp_path / "undone",
        against=place,
    )
    assert report.kl == pytest.approx(report.kl_before) and not changed(packed["gptq"], tmp_path / "undone")
    assert any("nothing better" in warning and "smaller lr" in warning for warning in report.warnings)


def test_stages_in_a_row_that_were_killed_end_in_the_same_bytes(packed, place, tmp_path, monkeypatch):
    monkeypatch.setattr(descent, "SAVE_SECONDS", 0.0)
    settings = {"tokens": 192, "batch": 1, "lr": 5e-3, "measures": 2}
    base = lowbit.recipe("gptq")
    made = Recipe(
        "two",
        base.scheme,
        (*base.stages, Train(StoredFloats(), NextToken(), **settings), Train(StoredFloats(), OriginalKL(), **settings)),
    )
    lowbit.train(packed["gptq"], made, text(), out=tmp_path / "whole", against=place)
    seen: list[str] = []

    def stop(done, total, what):
        if what.startswith("training, step 3 "):
            seen.append(what)
            if len(seen) == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lowbit.train(packed["gptq"], made, text(), out=tmp_path / "killed", against=place, progress=stop)
    steps: list[str] = []
    lowbit.train(
        packed["gptq"],
        made,
        text(),
        out=tmp_path / "killed",
        against=place,
        progress=lambda d, t, what: steps.append(what),
    )
    assert not any(what.startswith(("training, step 1 ", "training, step 2 ")) for what in steps)
    assert changed(tmp_path / "whole", tmp_path / "killed") == set()
    assert {path.name for path in (tmp_path / "whole").iterdir()} == {
        path.name for path in (tmp_path / "killed").iterdir()
    }
    assert (tmp_path / "whole" / "training-2.svg").read_bytes() == (tmp_path / "killed" / "training-2.svg").read_bytes()


TRAINING = """
import sys
sys.path[:0] = {path!r}
import torch
torch.set_num_threads(1)
import lowbit
from unit.test_retraining import text, two_stages
from lowbit.training import leads
report = lowbit.train({base!r}, two_stages(batch=1), text(), out={out!r}, against={place!r})
print(f"LOSS {{leads()}} {{report.loss}}\\n", end="")  # in one piece, whatever the other process prints
"""


def two_stages(batch: int) -> Recipe:
    """Latent weights, then what is stored, four windows a step."""
    options = {"tokens": 256, "batch": batch, "accumulate": 4 // batch, "measures": 2}
    stages = (
        Train(LatentWeights(), OriginalKL(), lr=1e-3, **options),
        Train(StoredFloats(), OriginalKL(), lr=5e-3, **options),
    )
    base = lowbit.recipe("rtn")
    return Recipe("two", base.scheme, (*base.stages, *stages))


@pytest.mark.slow
def test_two_processes_train_a_checkpoint_as_one_does(place, packed, tmp_path):
    """The first one writes and reports; both train. The losses are those of one process, up to the order of sums."""
    lowbit.train(packed["gptq"], two_stages(batch=4), text(), out=tmp_path / "one", against=place)
    words = {"path": SOURCES, "base": str(packed["gptq"]), "place": str(place), "out": str(tmp_path / "two")}
    done = launched_twice(tmp_path, TRAINING.format(**words))
    assert done.returncode == 0, done.stderr[-3000:]
    told = sorted(line for line in done.stdout.splitlines() if line.startswith("LOSS"))
    assert [line.split()[1] for line in told] == ["False", "True"] and told[0].split()[2] == told[1].split()[2]
    for number in (1, 2):
        files = [tmp_path / name / f"training-{number}.jsonl" for name in ("one", "two")]
        one, two = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
        for a, b in zip(one, two, strict=True):
            assert a["tokens"] == b["tokens"]
            for name in ("loss", "held_out_kl"):
                assert a[name] is None if b[name] is None else a[name] == pytest.approx(b[name], rel=1e-3)
    assert {p.name for p in (tmp_path / "one").iterdir()} == {p.name for p in (tmp_path / "two").iterdir()}
    assert not (tmp_path / "two.partial").exists()


@pytest.mark.parametrize(
    ("base", "recipe", "words"),
    [
        ("gptq", "rtn", "has no stage that trains a packed model"),
        ("gptq", "llm-qat", r"compares with the original model: name it with against= \(--against ORIGINAL\)"),
        ("gptq", "qlora", "no layer of .* has any"),
        ("qlora", "efficientqat+nf4", "compares with the original"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_any_work(base, recipe, words, packed, tmp_path):
    with pytest.raises(ValueError, match=words):
        prepare_training(packed[base], recipe, text(), out=tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 96}, "vocab_size is [0-9]+ here and 96 there"),
        ({"blocks": 3}, "num_hidden_layers is 2 here and 3 there"),
    ],
)
def test_a_model_that_is_not_the_original_is_refused_before_training(changes, words, packed, tmp_path):
    other = tiny_llama(tmp_path / "other", **changes)
    with pytest.raises(ValueError, match=f"is not the original of .*: {words}"):
        prepare_training(packed["gptq"], "efficientqat", text(), out=tmp_path / "out", against=other)
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_packed_and_text_of_its_own_are_refused(place, packed, tmp_path):
    with pytest.raises(ValueError, match="is not packed by lowbit; lowbit quantize packs it"):
        prepare_training(place, lowbit.recipe("qlora"), text(), out=tmp_path / "out")
    with pytest.raises(ValueError, match="generate-data ORIGINAL"):
        prepare_training(packed["qlora"], "qlora", "self", out=tmp_path / "out")
    base = lowbit.recipe("rtn")
    made = Recipe("rounded anew", base.scheme, (*base.stages, Train(LatentWeights(), NextToken(), tokens=64)))
    lowbit.quantize(place, lowbit.recipe("lut-gemm", bits=2), text(), out=place.parent / "codes", **QUIET)
    with pytest.raises(ValueError, match="LatentWeights rounds weights anew in each step"):
        prepare_training(place.parent / "codes", made, text(), out=tmp_path / "out")


# Methods that train behind others, in one run


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("awq+bitdistiller", {"bits": 2, "group_size": 32, "grid": 4, "lr": 1e-3}),
        ("smoothquant+llm-qat", {"bits": 2, "activation_bits": 8, "lr": 1e-3}),
        ("efficientqat+gptq", {"bits": 3, "group_size": 32, "epochs": 1, "objective": "original", "lr": 1e-2}),
    ],
)
def test_methods_that_train_follow_others_in_one_recipe(name, options, place, tmp_path):
    recipe = lowbit.recipe(name, tokens=384, batch=2, accumulate=1, measures=3, **options)
    lowbit.quantize(place, recipe, text(), out=tmp_path / "out", **QUIET)
    rows = [json.loads(line) for line in (tmp_path / "out" / "training-2.jsonl").read_text().splitlines()]
    measured = [row["held_out_kl"] for row in rows if row["held_out_kl"] is not None]
    assert len(measured) == 4 and min(measured) < measured[0]


# Memory


def test_one_model_is_in_memory_at_a_time(packed, tmp_path, monkeypatch):
    loaded, load = [], native.load

    def watched(*arguments, **options):
        assert not [each for each in loaded if each() is not None]
        model = load(*arguments, **options)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(native, "load", watched)
    recipe = lowbit.recipe("qlora", rank=4, tokens=64, measures=0, recompute=True)
    report = lowbit.train(packed["qlora"], recipe, text(), out=tmp_path / "out")
    assert len(loaded) == 4 and report.loss != report.loss_before  # before, in training, trained, and reloaded
