"""Asymmetric calibration: weights compensate for changed inputs, measured by two streams through one block."""

from __future__ import annotations

import copy
import itertools
from itertools import pairwise

import pytest
import torch
from torch import nn

import lowbit
from lowbit.architectures import for_config, resolve
from lowbit.checkpoints.source import open_model
from lowbit.modules import LinearFormat
from lowbit.numerics import CrossGram, Gram, Int, PerGroup, Spec
from lowbit.recipes import recipe
from lowbit.solve import Gptq
from lowbit.stages.stream import Stream
from lowbit.steps import BlockIO, BlockState, Solve
from lowbit.steps.collection import Collection

from helpers import random_ids, tiny_llama

W3 = Spec(Int(3), PerGroup(32))


@pytest.fixture(scope="module")
def second_block(tmp_path_factory):
    """A block of a tiny llama, its original inputs, and the same inputs moved by noise and by a linear map."""
    source = open_model(tiny_llama(tmp_path_factory.mktemp("model")))
    model = source.load_full()
    architecture = for_config(source.config)
    entered = [Stream(model, architecture).enter(window[None]) for window in random_ids(6, 32)]
    x_fp, call = torch.cat([hidden for hidden, _ in entered]), entered[0][1][0]
    g = torch.Generator().manual_seed(0)
    x = x_fp + 0.1 * x_fp @ torch.randn(64, 64, generator=g) / 8 + 0.05 * torch.randn(x_fp.shape, generator=g)
    block = model.model.layers[0].requires_grad_(False)
    return block, resolve(architecture, block, source.config), x, x_fp, call


@pytest.fixture
def state(second_block):
    def make(x_fp: torch.Tensor | None) -> BlockState:
        block, resolved, x, _, call = second_block
        formats = {path: LinearFormat(W3) for path in resolved.linears}
        return BlockState.of("block", copy.deepcopy(block), resolved, formats, BlockIO(x, None, call, x_fp))

    return make


def _inputs(block: nn.Module, path: str, x: torch.Tensor, call) -> torch.Tensor:
    found: list[torch.Tensor] = []
    handle = block.get_submodule(path).register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for window in x:
            call(block, window[None])
    handle.remove()
    return torch.cat(found)


def test_both_streams_meet_at_every_input(state, second_block):
    block, resolved, x, x_fp, call = second_block
    stats = state(x_fp).collect([Gram(), CrossGram()])
    for shared in resolved.shared_inputs:
        seen, original = (_inputs(block, shared.readers[0], each, call) for each in (x, x_fp))
        torch.testing.assert_close(stats[shared.name][CrossGram()], (original - seen).T @ seen, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(stats[shared.name][Gram()], seen.T @ seen, rtol=1e-4, atol=1e-3)


def test_one_stream_is_not_moved(state, second_block):
    for x_fp in (None, second_block[2]):
        for found in state(x_fp).collect([CrossGram()]).values():
            assert (found[CrossGram()] == 0).all()


def test_stage_by_stage_the_original_stream_passes_through_original_linears(state, second_block):
    _, _, x, x_fp, call = second_block
    work = state(x_fp)
    original = copy.deepcopy(work.block)
    seen: dict[str, torch.Tensor] = {}
    collect = work.collect

    def watched(needs, inputs=None):
        stats = collect(needs, inputs)
        seen.update({name: found[CrossGram()] for name, found in stats.items()})
        for name in stats:
            path = next(p for p, n in work.readers().items() if n == name)
            mine, theirs = _inputs(work.block, path, x, call), _inputs(original, path, x_fp, call)
            torch.testing.assert_close(seen[name], (theirs - mine).T @ mine, rtol=1e-3, atol=1e-2)
        return stats

    work.collect = watched  # pyright: ignore[reportAttributeAccessIssue]
    Solve(Gptq(asymmetric=0.5), true_sequential=True).run(work)
    assert len(seen) == 4  # q k v, o, gate up, down
    assert all(isinstance(work.block.get_submodule(path), lowbit.modules.QuantLinear) for path in work.formats)


@pytest.mark.parametrize("true_sequential", [False, True])
def test_the_block_comes_closer_to_the_original_output_with_the_share(state, second_block, true_sequential):
    block, _, x, x_fp, call = second_block
    missed = []
    for share in (0.0, 0.5, 1.0):
        work = state(x_fp)
        Solve(Gptq(order="group", asymmetric=share), true_sequential).run(work)
        with torch.no_grad():
            path = "self_attn.q_proj"
            mine = work.block.get_submodule(path)(_inputs(work.block, path, x, call))
            theirs = block.get_submodule(path)(_inputs(block, path, x_fp, call))
            missed.append(float((mine - theirs).square().sum()))
    assert all(b < a for a, b in pairwise(missed))


def test_tokens_that_the_original_model_routes_elsewhere_are_left_uncorrected(state, second_block, monkeypatch):
    work, observed, passes = state(second_block[3]), Collection._observed, itertools.count()

    def rerouted(self, gather):
        original = next(passes) % 2  # half of the tokens do not reach it
        return observed(self, (lambda name, x_TI: gather(name, x_TI[::2])) if original else gather)

    monkeypatch.setattr(Collection, "_observed", rerouted)
    stats = work.collect([Gram(), CrossGram()])
    assert all((found[CrossGram()] == 0).all() for found in stats.values()) and len(work.notes) == len(stats)


def test_a_whole_model_comes_out_closer_to_the_original(tmp_path):
    model = tiny_llama(tmp_path / "model", blocks=3)
    errors = []
    for share in (0.0, 0.5):
        made = recipe("gptq", bits=3, group_size=32, asymmetric=share)
        made = made.with_blockwise(compute="float32")  # else windows that are measured on are more exact
        report = lowbit.quantize(model, made, random_ids(24, 32), out=tmp_path / f"share {share}", max_kl=50)
        errors.append([block.error for block in report.blocks])
    assert errors[0][0] == errors[1][0]  # the first block's inputs are the original ones
    assert errors[1][-1] < errors[0][-1]
