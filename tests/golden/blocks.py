"""Blocks 2 and 14 of a real model, their inputs, and what a method loses there when it acts on the whole block.

Whole blocks take long, so the tests look at the records of block 14 alone; `make fidelity` looks at both.
"""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch import Tensor, nn

import lowbit
from lowbit.architectures import for_config, resolve
from lowbit.checkpoints.source import open_model
from lowbit.data import calibration_set
from lowbit.modules import fake_quantize_activation
from lowbit.stages.stream import Call, Stream
from lowbit.steps import BlockIO, BlockState, SearchReassembly, Step

import layers

TESTED = ".14."  # in the names of layers whose records the tests look at


@cache
def _model():
    source = open_model("smollm2-135m")
    return source, source.load_full().requires_grad_(False)


@cache
def _inputs(block: int) -> dict[str, Tensor]:
    """For each split the block's inputs ``[windows, 512, d]`` in the unquantized model."""
    return layers.cached(f"official-inputs-of-block-{block}", lambda: _gather(block))


def _gather(block: int) -> dict[str, Tensor]:
    source, model = _model()
    base = copy.copy(model.model)
    base._modules = dict(model.model._modules)
    base.layers = nn.ModuleList(model.model.layers[: block + 1])  # what comes later is not wanted
    base.config = copy.copy(base.config)
    base.config.num_hidden_layers = len(base.layers)
    found: dict[str, Tensor] = {}
    for split, (file, windows) in layers.SPLITS.items():
        ids = calibration_set(str(layers.DATA / "text" / file), source.tokenizer(), windows, layers.WINDOW).ids
        seen: list[Tensor] = []
        hook = base.layers[block].register_forward_pre_hook(lambda _, args, to=seen: to.append(args[0]))
        with torch.inference_mode():
            for window in ids:
                base(input_ids=window[None], use_cache=False)
        hook.remove()
        found[split] = torch.cat(seen).clone()
    return found


@cache
def _call(block: int) -> Call:
    source, model = _model()
    stream = Stream(model, for_config(source.config))
    return stream.enter(torch.zeros(1, layers.WINDOW, dtype=torch.int64))[1][block]


def _linear_inputs(module: nn.Module, block: int) -> dict[str, Tensor]:
    """Evaluation inputs ``[tokens, I]`` of the recorded linears of ``module``, a form of that block."""
    seen: dict[str, list[Tensor]] = {path: [] for path in layers.LINEARS}
    hooks = [
        module.get_submodule(path).register_forward_pre_hook(
            lambda _, args, to=to: to.append(args[0].flatten(0, 1)), prepend=True
        )
        for path, to in seen.items()
    ]
    with torch.inference_mode():
        for window in _inputs(block)["evaluation"]:
            _call(block)(module, window[None])
    for hook in hooks:
        hook.remove()
    return {path: torch.cat(parts) for path, parts in seen.items()}


@cache
def _wanted(block: int) -> dict[str, Tensor]:
    """``X W^T`` of the recorded linears in the unquantized block."""
    _, model = _model()
    module = model.model.layers[block]
    with torch.inference_mode():
        return {path: module.get_submodule(path)(x) for path, x in _linear_inputs(module, block).items()}


def errors_of(method: str, block: int, **options) -> dict[str, float]:
    """``||X W^T - q(X')||^2 / ||X W^T||^2`` of each recorded linear, q the packed layer as it runs.

    It is called with all evaluation tokens at once, or with ``tokens_a_call`` of them after another. X' are the inputs in the
    block whose transforms are folded and whose weights are not quantized yet; what a packed layer does to its input is done
    by the layer.
    """
    return _measured(method, block, **options)[0]


def bits_of(method: str, block: int, **options) -> dict[str, float]:
    """Stored bits a weight of each recorded linear."""
    return _measured(method, block, **options)[1]


def _begun(method: str, block: int, **options) -> tuple[BlockState, tuple[Step, ...]]:
    """A copy of the block before the first step of the method, and the steps."""
    source, model = _model()
    recipe = lowbit.recipe(method, **options)
    module = copy.deepcopy(model.model.layers[block])
    resolved = resolve(for_config(source.config), module, source.config)
    name = f"model.layers.{block}"
    io = BlockIO(_inputs(block)["calibration"], None, _call(block))
    return BlockState.of(name, module, resolved, recipe.scheme.formats(resolved, name), io), recipe.steps


@cache
def _measured(
    method: str, block: int, tokens_a_call: int | None = None, **options
) -> tuple[dict[str, float], dict[str, float]]:
    state, steps = _begun(method, block, **options)
    module = state.block
    moved = None
    for step in steps[:-1]:
        if isinstance(step, SearchReassembly):  # inexact, and not folded: its error is each layer's own
            moved = _linear_inputs(module, block)
        step.run(state)
    moved = moved or _linear_inputs(module, block)
    steps[-1].run(state)
    errors, bits = {}, {path: state.block.get_submodule(path).bits_per_weight for path in layers.LINEARS}
    with torch.inference_mode():
        for path, wanted in _wanted(block).items():
            x_TI = moved[path]
            found = torch.cat(
                [state.block.get_submodule(path)(part) for part in x_TI.split(tokens_a_call or len(x_TI))]
            )
            lost = (wanted - found).double().square().sum()
            errors[path] = (lost / wanted.double().square().sum()).item()
    return errors, bits


@cache
def input_errors_of(method: str, block: int, **options) -> dict[str, float]:
    """``||X W^T - Qx(X') W'^T||^2 / ||X W^T||^2`` of each recorded linear: what rounding the inputs alone loses."""
    state, steps = _begun(method, block, **options)
    for step in steps[:-1]:
        step.run(state)
    errors = {}
    with torch.inference_mode():
        for path, x in _linear_inputs(state.block, block).items():
            act, wanted = state.formats[path].act, _wanted(block)[path]
            assert act is not None
            rounded = fake_quantize_activation(x, act, state.draft(path).act_params)
            lost = (wanted - rounded @ state.draft(path).weight.T).double().square().sum()
            errors[path] = (lost / wanted.double().square().sum()).item()
    return errors


def place_of(record: dict) -> tuple[int, str]:
    _, _, block, path = record["layer"].split(".", 3)
    return int(block), path
