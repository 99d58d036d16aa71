"""Rows on a local Ray cluster of two nodes: the same figures, and a node that is lost costs no row."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import lowbit
from lowbit.comparison import child
from lowbit.comparison.on_ray import OnRay
from lowbit.comparison.workers import Assignment

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers import random_ids, tiny_llama
from slow_work import Slow

ray = pytest.importorskip("ray", reason="Ray (extra ray) is not installed")
pytestmark = pytest.mark.filterwarnings("default")  # Ray's own
MEMORY = 2**31
HERE = {"samples": 4, "seq_len": 16, "eval_seq_len": 32, "windows": 5, "threads": 1}


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    path = os.pathsep.join(entry for entry in sys.path if entry)
    made = Cluster()
    made.add_node(num_cpus=1, memory=MEMORY, object_store_memory=2**27, include_dashboard=False)
    made.add_node(num_cpus=1, memory=MEMORY, object_store_memory=2**27)
    ray.init(address=made.address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
    yield made
    ray.shutdown()
    made.shutdown()


def test_rows_on_ray_have_the_figures_of_rows_here_and_stream_into_the_same_file(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(child, "run_in_child", lambda work, threads, log, progress: child.attempt(work, progress))
    model = tiny_llama(tmp_path / "model")
    rows = [{"label": f"W{bits}", "method": "rtn", "bits": bits, "group_size": 32} for bits in (4, 3)]
    lines, asked = [], (random_ids(4, 16), random_ids(5, 32, seed=2))
    there = lowbit.compare(
        model,
        rows,
        *asked,
        tmp_path / "ray.jsonl",
        ray="auto",
        on_record=lambda each: lines.append(each["label"]),
        **HERE,
    )
    here = lowbit.compare(model, rows, *asked, tmp_path / "here.jsonl", **HERE)
    assert sorted(lines) == ["W3", "W4", "original"]
    for a, b in zip(there, here, strict=True):
        assert (a["label"], a["perplexity"], a.get("kl")) == (b["label"], b["perplexity"], b.get("kl"))
    assert [record["label"] for record in lowbit.compare(model, rows, *asked, tmp_path / "ray.jsonl", **HERE)] == [
        "original", "W4", "W3",
    ]  # fmt: skip


def test_a_row_that_no_machine_can_hold_is_refused(cluster, tmp_path):
    too_large = Assignment("huge", Slow(tmp_path, 0), tmp_path, memory=2 * MEMORY)
    with pytest.raises(ValueError, match=r"row 'huge' takes 1 processors and about 4\.29 GB"):
        list(OnRay("auto").run([too_large], 1, lambda done, what: None))


def test_a_lost_machine_costs_one_row_which_runs_again_on_another(cluster, tmp_path):
    large = {"num_cpus": 1, "memory": 2 * MEMORY, "object_store_memory": 2**27}  # only such nodes hold these rows
    node = cluster.add_node(**large)
    cluster.wait_for_nodes()
    places = [tmp_path / f"row-{i}" for i in range(2)]
    asked = [Assignment(f"row {i}", Slow(place, 20), place, memory=3 * 2**30) for i, place in enumerate(places)]
    lost, found = False, {}

    def lose(done: float, what: str) -> None:
        nonlocal lost
        if not lost and any((place / "started").exists() for place in places):
            lost = True
            cluster.remove_node(node)
            cluster.add_node(**large)

    for i, figures in OnRay("auto").run(asked, 1, lose):
        found[i] = figures
    assert lost and found == {i: {"answer": str(place)} for i, place in enumerate(places)}
    assert sorted(len((place / "started").read_text().splitlines()) for place in places) == [1, 2]
