"""Blocks that are solved elsewhere: which recipes allow it, and that the result has the same bytes."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import lowbit
from lowbit import pipeline
from lowbit.recipes import METHODS
from lowbit.stages import spread

from helpers import random_ids, tiny_llama

OPTIONS = {"rtn": {"group_size": 32}, "hqq": {"group_size": 32}, "nf4": {}, "lut-gemm": {"group_size": 32}, "mxfp4": {}}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("spread") / "model", blocks=3)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@contextmanager
def beside(address, plan, lost=()) -> Iterator[object]:
    """A cluster whose workers are this process, and lose the blocks ``lost`` each time."""

    class Here:
        asked: list[int] = []

        def solutions(self, i):
            self.asked.append(i)
            request = spread.Request(plan.source.path, plan.recipe, plan.kept.choice, False, torch.get_num_threads())
            return {} if i in lost else spread.solve_block(pickle.dumps(request), i)

    yield Here()


@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("with_text", [False, True])
def test_blocks_that_are_solved_elsewhere_give_the_bytes_and_the_report_of_a_run_alone(
    model, tmp_path, monkeypatch, method, with_text
):
    recipe, text = lowbit.recipe(method, **OPTIONS[method]), random_ids(4, 16) if with_text else None
    alone = lowbit.quantize(model, recipe, text, out=tmp_path / "alone", max_kl=50)
    monkeypatch.setattr(pipeline, "spread_over", beside)
    there = lowbit.quantize(model, recipe, text, out=tmp_path / "there", max_kl=50, ray="local")
    assert files(tmp_path / "there") == files(tmp_path / "alone")
    assert there.to_dict() | {"out": None} == alone.to_dict() | {"out": None}


def test_a_block_that_no_worker_gave_back_is_solved_by_the_walk(model, tmp_path, monkeypatch):
    lowbit.quantize(model, "rtn", None, out=tmp_path / "alone", max_kl=50)
    monkeypatch.setattr(pipeline, "spread_over", lambda address, plan: beside(address, plan, lost={1}))
    lowbit.quantize(model, "rtn", None, out=tmp_path / "there", max_kl=50, ray="local")
    assert files(tmp_path / "there") == files(tmp_path / "alone")


def test_the_walk_takes_what_workers_found_and_searches_nothing_again(model, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "spread_over", beside)
    recipe = lowbit.recipe("rtn", bits=8, group_size=32)
    real = spread.solve_block

    def coarse(request, i):
        asked = pickle.loads(request)
        two_bits = lowbit.recipe("rtn", bits=2, group_size=32)
        return real(pickle.dumps(spread.Request(asked.model, two_bits, "auto", False, asked.threads)), i)

    good = lowbit.quantize(model, recipe, random_ids(4, 16), out=tmp_path / "good", max_kl=50, ray="local")
    monkeypatch.setattr(spread, "solve_block", coarse)
    bad = lowbit.quantize(model, recipe, random_ids(4, 16), out=tmp_path / "bad", max_kl=50, ray="local")
    assert min(layer.error for layer in bad.worst_layers) > 10 * max(layer.error for layer in good.worst_layers)


def test_only_recipes_that_read_no_text_are_spread():
    apart = {name for name in METHODS if spread.why_dependent(lowbit.recipe(name)) is None}
    assert {"rtn", "hqq", "nf4", "mxfp4", "nvfp4", "fp8", "lut-gemm"} <= apart
    assert not apart & {"gptq", "awq", "smoothquant", "omniquant", "squeezellm", "quip", "autoround", "kivi"}


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("gptq", "Solve reads what the blocks before compute from the calibration text"),
        ("smoothquant", "reads what the blocks before compute"),
        ("squeezellm", "Fisher information"),
        ("kivi", "no stage that quantizes blocks"),
    ],
)
def test_a_recipe_whose_blocks_depend_on_each_other_is_refused_with_the_reason(model, tmp_path, method, words):
    with pytest.raises(ValueError, match=f"cannot be spread over Ray: .*{words}"):
        lowbit.quantize(model, method, random_ids(4, 16), out=tmp_path / "out", ray="local")
    assert not (tmp_path / "out.partial").exists()


def test_without_ray_its_option_is_refused_with_what_to_do(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'lowbit\[ray\]'"):
        lowbit.quantize(model, "rtn", None, out=tmp_path / "out", ray="local")
