"""One pass over the calibration windows: side by side on several threads, and only what is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from lowbit.modules import LinearFormat
from lowbit.numerics import AbsMax, Gram, Int, LaterRange, MovingRange, PerChannel, Samples, Spec, Tokens
from lowbit.steps import BlockIO, BlockState

import helpers
from helpers import tiny_llama

NEEDS = (AbsMax(), Gram(), LaterRange(2), MovingRange(), Samples(40), Tokens())


def tiny_mixtral(path: Path) -> Path:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=helpers.VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    MixtralForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(params=[tiny_llama, tiny_mixtral])
def state(request, tmp_path):
    block, resolved, io = helpers.first_block(request.param(tmp_path))
    formats = {path: LinearFormat(Spec(Int(4), PerChannel())) for path in resolved.linears}
    return BlockState.of("model.layers.0", block, resolved, formats, io)


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def collected(state: BlockState, threads: int, **options) -> dict[str, dict]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return state.collect(NEEDS, **options)
    finally:
        torch.set_num_threads(before)


def assert_equal(a: dict[str, dict], b: dict[str, dict]) -> None:
    assert a.keys() == b.keys()
    for name, found in a.items():
        assert found.keys() == b[name].keys()
        assert all(torch.equal(value, b[name][need]) for need, value in found.items()), name


def matmul_precision() -> str:
    return getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", "torch before 2.9 has none")


def test_statistics_do_not_depend_on_the_number_of_threads(state):
    alone, notes = collected(state, 1), list(state.notes)
    state.notes.clear()
    assert len(state.io) >= 3
    for _ in range(3):
        assert_equal(collected(state, 3), alone)
    assert state.notes == notes


def test_a_gram_matrix_beside_narrow_products_is_that_of_the_factors_they_read(state):
    exact = matmul_precision()
    object.__setattr__(state.io, "products", lambda: torch.autocast("cpu", torch.bfloat16))
    seen: dict[str, list[Tensor]] = {name: [] for name in state.readers().values()}
    for path, name in state.readers().items():
        state.draft(path).register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0]))
    narrow = collected(state, 1)
    assert matmul_precision() == exact, "products behind the pass would be rounded too"
    assert any(x.dtype == torch.bfloat16 for inputs in seen.values() for x in inputs)
    for name, found in narrow.items():
        x_TI = torch.cat([x.detach().flatten(0, -2) for x in seen[name]])
        wanted = x_TI.double().T @ x_TI.double()
        sizes = wanted.diagonal().sqrt()
        factor = 2**-24 * len(x_TI) if x_TI.dtype == torch.bfloat16 else 2**-7  # of both factors, and of the sum
        assert ((found[Gram()] - wanted).abs() <= factor * sizes * sizes[:, None] + 1e-30).all(), name


def test_what_only_the_output_needs_is_left_out_without_a_difference(state):
    behind = torch.full_like(state.io.x, torch.nan)
    assert_equal(collected(state, 1), collected(state, 1, behind=behind))
    with torch.no_grad():
        assert torch.equal(behind, torch.cat([state.io.call(state.block, x) for x in state.io.x.split(1)]))
    for stage in state.resolved.stages:
        names = [shared.name for shared in state.resolved.shared_inputs if set(shared.readers) & set(stage)]
        assert_equal(collected(state, 1, inputs=names), {name: collected(state, 1)[name] for name in names})


def test_linears_behind_the_last_wanted_input_are_not_multiplied(state):
    last = state.resolved.stages[-1]
    products = []
    for path in state.resolved.linears:
        state.draft(path).register_forward_hook(
            lambda module, inputs, y, path=path: products.append(path) if y.any() else None
        )
    collected(state, 1)
    assert products and not set(products) & set(last)


def test_a_linear_that_runs_several_times_is_seen_each_time_in_order(state, three_threads):
    path = next(iter(state.readers()))

    def twice(block: nn.Module, x: Tensor) -> Tensor:
        block.get_submodule(path)(x)
        return block.get_submodule(path)(2 * x)

    object.__setattr__(state.context, "io", BlockIO(state.io.x, None, twice))
    name = state.readers()[path]
    found = state.collect([AbsMax(), Tokens(), Samples(10**6)], [name])[name]
    each = [torch.cat([x, 2 * x]) for x in state.io.x]
    assert torch.equal(found[Samples(10**6)], torch.cat(each))
    assert found[Tokens()].item() == 2 * state.io.x[..., 0].numel()


def test_an_error_in_one_window_ends_the_pass(state, three_threads):
    def broken(block: nn.Module, x: Tensor) -> Tensor:
        if torch.equal(x, state.io.x[1:2]):
            raise RuntimeError("window 1")
        return call(block, x)

    call = state.io.call
    object.__setattr__(state.context, "io", BlockIO(state.io.x, None, broken))
    with pytest.raises(RuntimeError, match="window 1"):
        state.collect([Gram()])


def test_a_gram_matrix_in_strips_is_that_of_all_channels():
    x = torch.randint(-8, 9, (50, 700), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(Gram().merge(x), x.T @ x)
    parts = Gram().update(Gram().update(None, x[:13]), x[13:])
    assert torch.equal(Gram().complete(parts), x.T @ x)
