"""The loop of training: which steps it takes, what it keeps, and that a kill, a batch or a second process change none of it."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import lowbit
from lowbit.data import Calibration
from lowbit.plan.foresight import plan
from lowbit.recipes import Recipe, Train
from lowbit.stages import descent
from lowbit.stages.descent import Descent, StateFile, step_windows
from lowbit.training import (
    AdamW,
    Answer,
    ConfidenceKL,
    Cosine,
    Curve,
    Group,
    HiddenStates,
    LatentWeights,
    NextToken,
    OriginalKL,
    ReverseKL,
    Start,
    StoredFloats,
    Text,
    Trainable,
    draw_curve,
)

from helpers import SOURCES, launched_twice, random_ids, tiny_llama

QUIET = {"max_kl": 50.0, "allow_broken": True}


class Gains(Trainable):
    """Trains the gains of norms of any model: the least that a choice of parameters can be."""

    needs_packed = False

    def parameters(self, model: nn.Module, start: Start):
        return _Gains(model)


class _Gains:
    def __init__(self, model):
        self.model, self.notes = model, []
        self.moved = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters() if p.dim() == 1}
        self.groups = [Group(list(self.moved.values()))]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def replaced(self):
        return {name: 1 * p for name, p in self.moved.items()}

    def commit(self):
        for name, p in self.moved.items():
            self.model.get_parameter(name).data.copy_(p.detach())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("descent") / "model")


def setup(place, **settings) -> Descent:
    """A student whose gains were disturbed, and the model that it was as its teacher."""
    teacher, student = (LlamaForCausalLM.from_pretrained(place).eval().requires_grad_(False) for _ in range(2))
    with torch.no_grad():
        for name, p in student.named_parameters():
            if p.dim() == 1:
                p.mul_(1 + 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))

    def text(ids):
        return Text(ids, lambda i: Answer(teacher(input_ids=ids[i : i + 1]).logits[0]))

    options = {"epochs": 2, "lr": 0.1, "schedule": Cosine(0.1), "measures": 4, **settings}
    stage = Train(Gains(), OriginalKL(), **options)  # pyright: ignore[reportArgumentType]
    return Descent(
        student, stage, text(random_ids(8, 16)), text(random_ids(3, 16, seed=9)), blocks=student.model.layers
    )


def curve_in(directory: Path):
    return lambda kept: Curve(directory / "curve.jsonl", kept=kept)


def rows(directory: Path) -> list[dict]:
    found = [json.loads(line) for line in (directory / "curve.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.dim() == 1}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_a_training_lowers_the_divergence_on_windows_it_never_saw(place, tmp_path):
    work = replace(setup(place), curve=curve_in(tmp_path))
    notes = work.run()
    course = rows(tmp_path)
    assert [row["step"] for row in course] == list(range(9))
    assert [row["tokens"] for row in course] == [32 * step for step in range(9)]
    measured = [row["held_out_kl"] for row in course if row["held_out_kl"] is not None]
    assert len(measured) == 5 and measured[-1] < 0.7 * measured[0]
    assert measured[-1] == min(measured) and notes == []  # nothing out of the ordinary
    assert course[0]["loss"] is None and all(row["loss"] > 0 for row in course[1:])


def test_a_step_of_accumulated_batches_is_a_step_of_one_large_batch(place):
    whole, parts = (setup(place, batch=4), setup(place, batch=2, accumulate=2))
    whole.run(), parts.run()
    for a, b in zip(trained(whole.model).values(), trained(parts.model).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_blocks_that_run_again_in_the_backward_pass_give_the_same_steps(place):
    kept, again = setup(place), setup(place, recompute=True)
    kept.run(), again.run()
    assert_equal(trained(kept.model), trained(again.model))
    assert all("forward" not in vars(block) for block in again.blocks)


@pytest.mark.parametrize("stop_at", [2, 4, 7])
def test_a_killed_training_takes_the_steps_that_it_would_have_taken(place, tmp_path, monkeypatch, stop_at):
    monkeypatch.setattr(descent, "SAVE_SECONDS", 0.0)
    whole = replace(setup(place), curve=curve_in(tmp_path))
    whole.run()
    wanted = rows(tmp_path)
    (tmp_path / "killed").mkdir()

    def place_file(write):
        write(tmp_path / "writing")
        (tmp_path / "writing").replace(tmp_path / "state")

    taken = []

    def stop(done, total, what):
        taken.append(what)
        if len(taken) == stop_at + 1:  # the first call is the start
            raise KeyboardInterrupt

    state = StateFile(tmp_path / "state", place_file)
    killed = replace(setup(place), curve=curve_in(tmp_path / "killed"), state=state)
    with pytest.raises(KeyboardInterrupt):
        replace(killed, progress=stop).run()
    taken.clear()
    continued = replace(setup(place), curve=curve_in(tmp_path / "killed"), state=state)
    replace(continued, progress=lambda done, total, what: taken.append(what)).run()
    assert len(taken) == 8 - (stop_at - 1) and taken[0].startswith(f"training, step {stop_at} of 8")
    assert rows(tmp_path / "killed") == wanted
    assert_equal(trained(whole.model), trained(continued.model))


def test_ctrl_c_in_the_middle_of_a_step_keeps_all_steps_before_it(place, tmp_path):
    whole = setup(place)
    whole.run()
    state = StateFile(tmp_path / "state", lambda write: write(tmp_path / "state"))
    stopped, calls = replace(setup(place), state=state), 0

    def interrupt(*_):
        nonlocal calls
        calls += 1
        if calls == 9:  # three windows measured, a step, a step and three windows: the third step
            raise KeyboardInterrupt

    handle = stopped.blocks[0].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    handle.remove()
    taken = []
    continued = replace(setup(place), state=state, progress=lambda done, total, what: taken.append(what))
    continued.run()
    assert len(taken) == 6 and taken[0].startswith("training, step 3 of 8")
    assert_equal(trained(whole.model), trained(continued.model))


def test_a_state_that_is_damaged_lets_the_training_begin_anew(place, tmp_path):
    whole = setup(place)
    whole.run()
    (tmp_path / "state").write_bytes(b"no state")
    again = replace(setup(place), state=StateFile(tmp_path / "state", lambda write: None))
    again.run()
    assert_equal(trained(whole.model), trained(again.model))


def test_the_best_state_is_kept_and_a_training_that_gets_no_better_stops(place, tmp_path):
    work = replace(setup(place, lr=3.0, epochs=8, measures=32, patience=3), curve=curve_in(tmp_path))
    before = trained(work.model)
    notes = work.run()
    course = rows(tmp_path)
    assert min(row["held_out_kl"] for row in course) == course[0]["held_out_kl"]
    assert len(course) == 4 and any("stopped at step 3 of 32" in note for note in notes)
    assert_equal(trained(work.model), before)


def test_a_state_before_the_last_that_is_kept_is_named_with_what_it_reached(place, tmp_path):
    work = replace(setup(place, lr=0.3, epochs=8, measures=32, schedule=Cosine(floor=1.0)), curve=curve_in(tmp_path))
    notes = work.run()
    measured = [row["held_out_kl"] for row in rows(tmp_path)]
    best = measured.index(min(measured))
    assert 0 < best < 32 and [
        note for note in notes if f"kept step {best} of 32, with a KL of {min(measured):.4f}" in note
    ]


def test_without_held_out_text_the_last_state_is_kept(place):
    measured, plain = setup(place, lr=3.0), replace(setup(place, lr=3.0), held_out=None)
    measured.run(), plain.run()
    assert any(not torch.equal(a, b) for a, b in zip(trained(measured.model).values(), trained(plain.model).values()))


def test_the_gradients_norm_is_limited(place, monkeypatch):
    seen = []
    step = torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        leaves = [p.grad for group in self.param_groups for p in group["params"]]
        seen.append(torch.cat([g.flatten() for g in leaves]).norm().item())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    setup(place, clip_norm=1e-3).run()
    assert max(seen) <= 1.001e-3
    seen.clear()
    setup(place).run()
    assert max(seen) > 1e-2


def test_the_course_of_a_training_is_drawn_with_all_that_was_measured(tmp_path):
    curve = Curve(tmp_path / "curve.jsonl")
    draw_curve(tmp_path / "curve.jsonl", tmp_path / "curve.svg")
    assert not (tmp_path / "curve.svg").exists()  # nothing happened yet
    for step in range(4):
        row = {"step": step, "tokens": 32 * step, "loss": 3.0 - step if step else None, "lr": 1.0, "seconds": step}
        curve.add({**row, "held_out_kl": None, "held_out_loss": 2.0 if step % 2 else None})
    for name in ("one", "two"):
        draw_curve(tmp_path / "curve.jsonl", tmp_path / f"{name}.svg")
    drawn = (tmp_path / "one.svg").read_text()
    assert drawn == (tmp_path / "two.svg").read_text() and drawn.count('id="line2d_') > 10
    lines = [part for part in drawn.split("<path d=")[1:] if "clip-path" in part.split(">")[0]]
    assert lines and "KL on" not in drawn


def test_weight_decay_and_rates_of_groups_reach_the_optimizer():
    leaves = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    made = AdamW(weight_decay=0.1).make([Group(leaves[:1]), Group(leaves[1:], 5.0), Group([])], 1e-3)
    assert [group["lr"] for group in made.param_groups] == [1e-3, 5e-3]
    assert all(group["weight_decay"] == 0.1 for group in made.param_groups)


def test_a_cosine_warms_up_and_falls_to_its_floor():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=2.0)
    schedule, rates = Cosine(warmup=0.2, floor=0.1).make(optimizer, 10), []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step(), schedule.step()
    assert rates[:2] == [1.0, 2.0] and rates[2] == 2.0
    assert all(a > b for a, b in itertools.pairwise(rates[2:])) and rates[-1] > 0.2
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2)


def test_tokens_say_how_many_windows_are_read_and_each_pass_has_its_own_order():
    stage = Train(StoredFloats(), NextToken(), tokens=50, batch=2)
    steps = step_windows(stage, 3, 10, seed=4)
    seen = [w for step in steps for w in step]
    assert len(seen) == 5 and sorted(seen[:3]) == [0, 1, 2] and len(set(seen[3:])) == 2
    assert [len(step) for step in steps] == [2, 1, 2]
    assert step_windows(stage, 3, 10, seed=4) == steps
    assert step_windows(replace(stage, tokens=0), 3, 10, seed=4) == []
    assert stage.windows(10) == (5, 10) and replace(stage, seq_len=20).windows(10) == (3, 20)


SCRIPT = """
import sys, torch
sys.path[:0] = {path!r}
torch.set_num_threads(1)
from unit.training.test_descent import setup, trained
from lowbit.training import Processes
work = setup({place!r}, batch=1, accumulate=4)
work.run()
here = Processes.here()
assert here.count == 2
torch.save(trained(work.model), {out!r} + f"/{{here.rank}}")
"""


@pytest.mark.slow
@pytest.mark.parametrize("config", ["accelerate-two-processes.yaml", "accelerate-fsdp2.yaml"])
def test_two_processes_take_the_steps_of_one(config, place, tmp_path):
    """Under ``accelerate launch``, on CPUs with gloo: each has half of a step's windows."""
    alone = setup(place, batch=4)
    alone.run()
    done = launched_twice(tmp_path, SCRIPT.format(path=SOURCES, place=str(place), out=str(tmp_path)), config)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert_equal(first, second)
    for a, b in zip(trained(alone.model).values(), first.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# Whole runs


def _recipe(**settings) -> Recipe:
    base = lowbit.recipe("rtn", bits=3, group_size=32)
    options = {"lr": 5e-3, "measures": 2, **settings}
    return replace(base, stages=(*base.stages, Train(StoredFloats(), OriginalKL(), **options)))


def _calibration(further: int = 6, tokens: int = 32) -> Calibration:
    ids = random_ids(10, 32)
    beyond = random_ids(further, tokens, seed=7) if further else None
    return Calibration(ids[:4], "a text", "0", held_out=ids[4:6], further=beyond)


def test_a_run_trains_on_further_text_and_leaves_the_course_beside_its_weights(place, tmp_path):
    out = tmp_path / "out"
    lowbit.quantize(place, _recipe(tokens=256, seq_len=64), _calibration(4, 64), out=out, **QUIET)
    course = [json.loads(line) for line in (out / "training-2.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in course] == [0, 128, 256]
    assert course[-1]["held_out_kl"] < course[0]["held_out_kl"]
    assert {path.name for path in out.iterdir()} <= {
        "config.json", "lowbit-report.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json", "README.md",
        "training-2.jsonl", "training-2.svg", "training-2.tensorboard",
    }  # fmt: skip


@pytest.mark.parametrize("tokens", [None, 192])
@pytest.mark.parametrize("objective", [HiddenStates(), NextToken(), ReverseKL(), ConfidenceKL()], ids=str)
def test_every_objective_trains_on_calibration_windows_and_on_further_text(objective, tokens, place, tmp_path):
    recipe = _recipe(tokens=tokens, epochs=2, recompute=True)
    recipe = replace(recipe, stages=(recipe.stages[0], replace(recipe.stages[1], objective=objective)))
    lowbit.quantize(place, recipe, _calibration(), out=tmp_path / "out", **QUIET)
    course = [json.loads(line) for line in (tmp_path / "out" / "training-2.jsonl").read_text().splitlines()]
    assert course[-1]["tokens"] == (256 if tokens is None else 192)
    assert all(row["loss"] > 0 for row in course[1:])
    if not isinstance(objective, NextToken):  # text of random tokens teaches nothing about the original
        assert course[-1]["held_out_kl"] < course[0]["held_out_kl"]


def test_a_plan_counts_what_training_holds(place):
    """Weights in training, and the original where text beyond the calibration windows is read."""
    small, large = (
        plan(place, lowbit.recipe(name, bits=4, group_size=32), samples=4, seq_len=32).peak_ram_parts
        for name in ("rtn", "bitdistiller")
    )
    assert "train" not in small
    weights = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 96 * 64 * 3)
    assert large["train"]["weights in training"] == 4 * 6 * weights and large["train"]["original"] > 4 * weights


def test_text_that_is_too_short_is_read_again_and_said(place, tmp_path):
    report = lowbit.quantize(place, _recipe(tokens=320), _calibration(4), out=tmp_path / "out", **QUIET)
    assert any("trained 2.5 times on the same 128 tokens" in note for note in report.warnings)
    course = (tmp_path / "out" / "training-2.jsonl").read_text().splitlines()
    assert json.loads(course[-1])["tokens"] == 320


def test_zero_tokens_store_what_was_there(place, tmp_path):
    plain = lowbit.recipe("rtn", bits=3, group_size=32)
    lowbit.quantize(place, plain, _calibration(), out=tmp_path / "plain", **QUIET)
    lowbit.quantize(place, _recipe(tokens=0, measures=0), _calibration(), out=tmp_path / "zero", **QUIET)
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "zero"))
    assert a == b


def test_a_run_killed_in_its_training_ends_in_the_same_bytes(place, tmp_path, monkeypatch):
    monkeypatch.setattr(descent, "SAVE_SECONDS", 0.0)
    recipe, text = _recipe(tokens=320, batch=1), _calibration()
    lowbit.quantize(place, recipe, text, out=tmp_path / "whole", **QUIET)

    def stop(done, total, what):
        if what.startswith("training, step 5 "):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lowbit.quantize(place, recipe, text, out=tmp_path / "killed", progress=stop, **QUIET)
    taken: list[str] = []
    lowbit.quantize(
        place, recipe, text, out=tmp_path / "killed", progress=lambda done, total, what: taken.append(what), **QUIET
    )
    assert not any(what.startswith("training, step 3 ") for what in taken)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    courses = [(tmp_path / name / "training-2.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    for a, b in zip(*(map(json.loads, course) for course in courses), strict=True):
        assert a | {"seconds": 0} == b | {"seconds": 0}


def test_the_training_text_is_part_of_what_a_run_is_continued_for(place, tmp_path):
    from lowbit.job import prepare

    jobs = [prepare(place, _recipe(tokens=96), _calibration(count), out=tmp_path / "out") for count in (3, 4, 0)]
    assert len({job.header.get("training") for job in jobs}) == 3
    assert jobs[2].header.get("training") is None


RUN = """
import sys
sys.path[:0] = {path!r}
import torch
torch.set_num_threads(1)
import lowbit
from unit.training.test_descent import QUIET, _calibration, _two_stages
from lowbit.training import leads
report = lowbit.quantize({place!r}, _two_stages(batch=1, accumulate=4), _calibration(8), out={out!r}, **QUIET)
print(f"KL {{leads()}} {{report.kl}}\\n", end="")  # in one piece, whatever the other process prints
"""


def _two_stages(**settings) -> Recipe:
    """Latent weights on further text, then what is stored on calibration windows, which one process streams."""
    blockwise = lowbit.recipe("rtn", bits=3, group_size=32).stages
    first = Train(LatentWeights(), OriginalKL(), tokens=256, lr=1e-3, measures=2, schedule=Cosine(), **settings)
    second = Train(StoredFloats(), OriginalKL(), epochs=2, lr=5e-3, measures=2, **settings)
    return Recipe("two", lowbit.recipe("rtn", bits=3, group_size=32).scheme, (*blockwise, first, second))


@pytest.mark.slow
def test_a_whole_run_of_two_processes_trains_as_one_does(place, tmp_path):
    """Rank 0 quantizes, writes and reports; both train. The losses are those of one process, up to the order of sums."""
    lowbit.quantize(place, _two_stages(batch=4), _calibration(8), out=tmp_path / "one", **QUIET)
    done = launched_twice(tmp_path, RUN.format(path=SOURCES, place=str(place), out=str(tmp_path / "two")))
    assert done.returncode == 0, done.stderr[-3000:]
    told = sorted(line for line in done.stdout.splitlines() if line.startswith("KL"))
    assert [line.split()[1] for line in told] == ["False", "True"] and told[0].split()[2] == told[1].split()[2]
    for number in (2, 3):
        files = [tmp_path / name / f"training-{number}.jsonl" for name in ("one", "two")]
        one, two = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
        assert [row["tokens"] for row in one] == [row["tokens"] for row in two]
        for a, b in zip(one, two, strict=True):
            for name in ("loss", "held_out_kl"):
                assert a[name] is None if b[name] is None else a[name] == pytest.approx(b[name], rel=1e-3)
    assert {p.name for p in (tmp_path / "one").iterdir()} == {p.name for p in (tmp_path / "two").iterdir()}
    assert not (tmp_path / "two.partial").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": -1}, "0 tokens or more"),
        ({"seq_len": 32}, "seq_len is of the windows that tokens asks for"),
        ({"patience": 2}, "set measures too"),
        ({"clip_norm": 0.0}, "clip_norm is positive"),
        ({"accumulate": 0}, "accumulate of at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Train(StoredFloats(), OriginalKL(), **settings)


def test_stages_with_windows_of_two_lengths_are_refused():
    base = _recipe(tokens=64, seq_len=32)
    with pytest.raises(ValueError, match="have one seq_len"):
        replace(base, stages=(*base.stages, replace(base.stages[1], seq_len=16)))
