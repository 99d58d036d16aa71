"""Rows and blocks on a local Ray cluster of two nodes: the same figures and bytes, and a node that is lost costs only its own."""

from __future__ import annotations

import os
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

import lowbit
from lowbit.comparison import child
from lowbit.comparison.on_ray import OnRay
from lowbit.comparison.workers import Assignment
from lowbit.stages import spread

sys.path.insert(0, str(Path(__file__).parents[1]))
from comparing import compare
from helpers import random_ids, tiny_llama
from slow_work import Slow, dies, dies_once

ray = pytest.importorskip("ray", reason="Ray (extra ray) is not installed")
pytestmark = pytest.mark.filterwarnings("default")  # Ray's own
MEMORY = 2**31


def node(**more: object) -> dict[str, object]:
    """A node's settings. Ports that are given are not waited for, which fails on a busy machine."""
    names = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in names]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        ports = {name: each.getsockname()[1] for name, each in zip(names, sockets, strict=True)}
    return {"num_cpus": 1, "memory": MEMORY, "object_store_memory": 2**27, **ports, **more}


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    path = os.pathsep.join(entry for entry in sys.path if entry)
    made = Cluster()
    made.add_node(**node(include_dashboard=False))
    made.add_node(**node())
    ray.init(address=made.address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
    yield made
    ray.shutdown()
    made.shutdown()


def test_rows_on_ray_have_the_figures_of_rows_here_and_stream_into_the_same_file(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(child, "run_in_child", lambda work, threads, log, progress: child.attempt(work, progress))
    model = tiny_llama(tmp_path / "model")
    rows = [{"label": f"W{bits}", "method": "rtn", "bits": bits, "group_size": 32} for bits in (4, 3)]
    lines = []
    there = compare(model, rows, tmp_path / "ray.jsonl", ray="auto", on_record=lambda each: lines.append(each["label"]))
    here = compare(model, rows, tmp_path / "here.jsonl")
    assert sorted(lines) == ["W3", "W4", "original"]
    for a, b in zip(there, here, strict=True):
        assert (a["label"], a["perplexity"], a.get("kl")) == (b["label"], b["perplexity"], b.get("kl"))
    assert [record["label"] for record in compare(model, rows, tmp_path / "ray.jsonl")] == [
        "original", "W4", "W3",
    ]  # fmt: skip


def test_a_row_that_no_machine_can_hold_is_refused(cluster, tmp_path):
    too_large = Assignment("huge", Slow(tmp_path, 0), tmp_path, memory=2 * MEMORY)
    with pytest.raises(ValueError, match=r"row 'huge' takes 1 processors and about 4\.29 GB"):
        list(OnRay("auto").run([too_large], 1, lambda done, what: None))


def test_a_lost_machine_costs_one_row_which_runs_again_on_another(cluster, tmp_path):
    first = cluster.add_node(**node(memory=2 * MEMORY))  # only such nodes hold these rows
    cluster.wait_for_nodes()
    places = [tmp_path / f"row-{i}" for i in range(2)]
    asked = [Assignment(f"row {i}", Slow(place, 20), place, memory=3 * 2**30) for i, place in enumerate(places)]
    lost, found = False, {}

    def lose(done: float, what: str) -> None:
        nonlocal lost
        if not lost and any((place / "started").exists() for place in places):
            lost = True
            cluster.remove_node(first)
            cluster.add_node(**node(memory=2 * MEMORY))

    for i, figures in OnRay("auto").run(asked, 1, lose):
        found[i] = figures
    assert lost and found == {i: {"answer": str(place)} for i, place in enumerate(places)}
    assert sorted(len((place / "started").read_text().splitlines()) for place in places) == [1, 2]


def test_blocks_on_ray_give_the_bytes_of_a_run_here_though_a_worker_dies(cluster, tmp_path, monkeypatch):
    model, die = tiny_llama(tmp_path / "model", blocks=4), tmp_path / "die"
    recipe, text = lowbit.recipe("hqq", bits=3, group_size=32), random_ids(4, 16)
    lowbit.quantize(model, recipe, text, out=tmp_path / "here", max_kl=50)
    die.touch()
    monkeypatch.setattr(spread, "solve_block", lambda request, i: dies_once(die, request, i))
    lowbit.quantize(model, recipe, text, out=tmp_path / "there", max_kl=50, ray="auto")
    assert not die.exists()
    for file in (tmp_path / "here").iterdir():
        assert file.read_bytes() == (tmp_path / "there" / file.name).read_bytes(), file.name


def test_a_block_whose_workers_all_die_is_solved_here(cluster, tmp_path, monkeypatch):
    model = tiny_llama(tmp_path / "model")
    lowbit.quantize(model, "rtn", None, out=tmp_path / "here", max_kl=50)
    monkeypatch.setattr(spread, "solve_block", dies)
    lowbit.quantize(model, "rtn", None, out=tmp_path / "there", max_kl=50, ray="auto")
    for file in (tmp_path / "here").iterdir():
        assert file.read_bytes() == (tmp_path / "there" / file.name).read_bytes(), file.name
