"""How much memory a run needs at its worst moment: an estimate from shapes, term by term.

A run has four moments that can be the worst, and what each holds is

    start      P + A + E + B                     the first block's inputs are made
    block      P + A + B + L + max over steps of (statistics + what the step keeps + one window's activations)
    compare    P + A + O + 8 V                   the logits of both models, window by window
    reload     P + A + O + Q + 6 V               the finished checkpoint, packed, against the logits kept

and, where a recipe needs Fisher information, two more, with an array of activations for every block in A:

    loss       P + A + O + 6 V                   the gradient behind the last block
    gradients  P + A + 2 B + G + 3 W             a block, its squares, the gradient of its largest weight (G), one window (W)

P is the process itself (Python, torch, transformers: measured). A is the activations of the calibration set, three arrays
``[N, T, d]`` of float32, as far as they fit in the limit that the user set; the rest is in files. B is the largest block in
float32, L its largest tensor as stored, O everything outside the blocks in float32 and E the same without the head, Q the
packed layers, V the logits of one window in float32. Where a stage trains the packed model, one more:

    train      P + A + 2 O + Q + C + b (8 V + n W) + 4 D

with C a byte for each weight (its code), b windows a step through n blocks, and D the largest layer in float32. What steps
need:

* statistics: what each request keeps of each shared input (asked of the request itself, on the meta device), and the
  largest of them once more for the batch that is being added;
* a search keeps the inputs and outputs of the modules that it judges by, over its calibration windows, and works on
  three copies of the weights behind one edge; one of channels to split and merge, on four matrices of an input's width;
* learning keeps, for the backward pass, eight copies of the weights and of one batch's activations;
* a solver that needs a matrix of each input (a Gram matrix) works on six float64 copies of one, and on four float32
  copies of the weight; every solver, on three.

An estimate, because allocators round up and keep what was freed. On SmolLM2-135M and on random models of two blocks (d 576
with a vocabulary of 49,152, and d 1,024), five methods peaked between 0.95 and 1.12 times what is said here.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

import torch

from lowbit.architectures import ResolvedEdge
from lowbit.numerics import Samples, Statistic
from lowbit.plan.survey import Survey, SurveyedBlock, edge_uses, edges_of, outside_bytes
from lowbit.recipes import Train
from lowbit.steps import Learn, Search, SearchReassembly, Solve

PROCESS = 420 * 2**20
"""Bytes of a process that has imported everything and run a tiny model."""
FLOAT = 4
_LEARN_COPIES, _FACTOR_COPIES, _SOLVER_COPIES, _SEARCH_COPIES, _DISTANCE_COPIES = 8, 6, 4, 3, 4
_CHECKED_TOKENS = Samples(256)  # of every input, on which the walk measures each layer's error


def activation_bytes(found: Survey, tokens: int, ram_limit: int, arrays: int = 3) -> tuple[int, int]:
    """(in memory, in files): arrays of float32, each in memory while all there fit the limit, as the store decides."""
    size, ram = tokens * found.source.config.get_text_config().hidden_size * FLOAT, 0
    for _ in range(arrays):
        ram += size if ram + size <= ram_limit else 0
    return ram, arrays * size - ram


def peak_disk_bytes(found: Survey, tokens: int, ram_limit: int) -> int:
    """Of temporary files: activations beyond the limit, and Fisher information where the recipe needs it."""
    if not found.recipe.needs_fisher:
        return activation_bytes(found, tokens, ram_limit)[1]
    squares = sum(prod(block.shape(path)) for block in found.blocks for path in block.formats) * FLOAT
    return activation_bytes(found, tokens, ram_limit, 3 + len(found.blocks))[1] + squares


def peak_parts(found: Survey, samples: int, seq_len: int, ram_limit: int) -> dict[str, dict[str, int]]:
    """Bytes of each moment's terms (see the module docstring); the peak is the largest sum."""
    tokens = samples * seq_len
    held = {"process": PROCESS, "activations": activation_bytes(found, tokens, ram_limit)[0]}
    worst = max(found.blocks, key=lambda block: _block_bytes(block) + _largest_step(found, block, samples, seq_len)[1])
    step, need = _largest_step(found, worst, samples, seq_len)
    largest = max(p.numel() for p in worst.module.parameters()) * found.source.dtype.itemsize
    block = {"block": _block_bytes(worst), "largest tensor": largest, f"step {step}": need}
    if not tokens:
        return {"block": held | block}
    outside = outside_bytes(found, FLOAT)
    logits = seq_len * found.source.config.get_text_config().vocab_size * FLOAT
    packed = sum(found.description(b, path).nbytes for b in found.blocks for path in b.formats)
    fisher = _fisher_parts(found, worst, samples, seq_len, ram_limit) if found.recipe.needs_fisher else {}
    train = _train_parts(found, worst, seq_len, held, packed)
    return (fisher | train) | {
        "start": held | {"embeddings": _base_bytes(found), "block": _block_bytes(found.blocks[0])},
        "block": held | block,
        "compare": held | {"outside the blocks": outside, "logits": 8 * logits},
        "reload": held | {"outside the blocks": outside, "packed layers": packed, "logits": 6 * logits},
    }


def _train_parts(
    found: Survey, worst: SurveyedBlock, seq_len: int, held: dict[str, int], packed: int
) -> dict[str, dict[str, int]]:
    batch = max((stage.batch for stage in found.recipe.stages if isinstance(stage, Train)), default=0)
    if not batch:
        return {}
    logits = seq_len * found.source.config.get_text_config().vocab_size * FLOAT
    weights = sum(prod(block.shape(path)) for block in found.blocks for path in block.formats)
    kept = len(found.blocks) * _window_bytes(found, worst, seq_len)
    return {
        "train": held
        | {
            "outside the blocks, packed and original": 2 * outside_bytes(found, FLOAT),
            "packed layers": packed,
            "codes": weights,
            "logits": 8 * batch * logits,
            "activations of a batch": int(batch * kept),
            "decoded layer": 4 * FLOAT * max((prod(worst.shape(path)) for path in worst.formats), default=0),
        }
    }


def _fisher_parts(
    found: Survey, worst: SurveyedBlock, samples: int, seq_len: int, ram_limit: int
) -> dict[str, dict[str, int]]:
    boundaries = activation_bytes(found, samples * seq_len, ram_limit, 3 + len(found.blocks))[0]
    held = {"process": PROCESS, "activations": boundaries}
    logits = seq_len * found.source.config.get_text_config().vocab_size * FLOAT
    largest = max((prod(worst.shape(path)) for path in worst.formats), default=0) * FLOAT
    return {
        "loss": held | {"outside the blocks": outside_bytes(found, FLOAT), "logits": 6 * logits},
        "gradients": held
        | {
            "block": _block_bytes(worst),
            "squares": _block_bytes(worst),
            "largest gradient": largest,
            "window": int(3 * _window_bytes(found, worst, seq_len)),
        },
    }


def _block_bytes(block: SurveyedBlock) -> int:
    return sum(p.numel() for p in block.module.parameters()) * FLOAT


def _base_bytes(found: Survey) -> int:
    prefix, base = f"{found.architecture.blocks}.", f"{found.model.base_model_prefix}."
    named = found.model.named_parameters()
    return sum(p.numel() for name, p in named if name.startswith(base) and not name.startswith(prefix)) * FLOAT


def _largest_step(found: Survey, block: SurveyedBlock, samples: int, seq_len: int) -> tuple[str, int]:
    sizes = [(type(step).__name__, _step_bytes(found, block, step, samples, seq_len)) for step in found.recipe.steps]
    return max(sizes, key=lambda size: size[1])


def _step_bytes(found: Survey, block: SurveyedBlock, step: Any, samples: int, seq_len: int) -> int:
    tokens = samples * seq_len
    window = _window_bytes(found, block, seq_len)
    size = statistics_bytes(block, step.needs, tokens) + (window if tokens else 0)
    if isinstance(step, Search):
        heard = tokens if step.windows is None else min(step.windows, samples) * seq_len
        size += heard * _judged_width(found, block, step) * FLOAT + _SEARCH_COPIES * _edge_bytes(block, step)
    if isinstance(step, SearchReassembly):
        heard = (samples if step.windows is None else min(step.windows, samples)) * seq_len
        read = [(block.shape(path)[1], _share(found, block, path)) for path in _first_readers(block)]
        size += 2 * heard * sum(width * share for width, share in read) * FLOAT
        size += _DISTANCE_COPIES * max((width for width, _ in read), default=0) ** 2 * FLOAT
    if isinstance(step, Learn):
        weights = sum(prod(block.shape(path)) for path in block.formats)
        size += _LEARN_COPIES * (weights * FLOAT + step.batch * window)
    if isinstance(step, Solve):
        size += statistics_bytes(block, {_CHECKED_TOKENS}, tokens) + _solver_bytes(block, step.solver)
    return int(size)


def _window_bytes(found: Survey, block: SurveyedBlock, seq_len: int) -> float:
    """Inputs and outputs of all linears for one window."""
    return seq_len * sum(sum(block.shape(path)) * _share(found, block, path) for path in block.resolved.linears) * FLOAT


def statistics_bytes(block: SurveyedBlock, needs: Iterable[Statistic], tokens: int) -> int:
    """What is kept of the block's shared inputs, and the largest item once more. Nothing without tokens."""
    if not tokens:
        return 0
    widths = [block.shape(path)[1] for path in _first_readers(block)]
    sizes = [_statistic_bytes(need, tokens, width) for need in needs for width in widths]
    return sum(sizes) + max(sizes, default=0)


def _first_readers(block: SurveyedBlock) -> list[str]:
    """The first linear to be quantized of each shared input that has one."""
    inputs = ([path for path in shared.readers if path in block.formats] for shared in block.resolved.shared_inputs)
    return [readers[0] for readers in inputs if readers]


def _statistic_bytes(need: Statistic, tokens: int, width: int) -> int:
    if not need.of_input:
        return 0
    with torch.device("meta"):
        return need.merge(torch.empty(2, tokens, width) if need.paired else torch.empty(tokens, width)).nbytes


def _solver_bytes(block: SurveyedBlock, solver: Any) -> int:
    sizes = [0]
    for path in block.formats:
        rows, columns = block.shape(path)
        matrix = any(_statistic_bytes(need, 1, columns) >= columns**2 * FLOAT for need in solver.needs)
        factor = _FACTOR_COPIES * 8 * columns**2 if matrix else 0
        sizes.append(factor + (_SOLVER_COPIES if matrix else _SOLVER_COPIES - 1) * FLOAT * rows * columns)
    return max(sizes)


def _judged_width(found: Survey, block: SurveyedBlock, step: Search) -> float:
    """Values a token that a search keeps: inputs and outputs of the modules it judges by."""
    hidden = found.source.config.get_text_config().hidden_size
    width = 0.0
    for judge in {path for edge in _legal(block, step) for path in _judges(block, step, edge)}:
        width += _share(found, block, judge) * (
            sum(block.shape(judge)) if judge in block.resolved.linears else 2 * hidden
        )
    return width


def _judges(block: SurveyedBlock, step: Search, edge: ResolvedEdge) -> list[str]:
    return [edge.judge] if step.by == "judge" else [p.module for p in edge.consumers if p.module in block.formats]


def _legal(block: SurveyedBlock, step: Any) -> list[ResolvedEdge]:
    return [edge for use in edge_uses(step) for edge, _, why_not in edges_of(use, block) if edge and not why_not]


def _edge_bytes(block: SurveyedBlock, step: Any) -> int:
    """Bytes of the weights behind the largest edge that the step works on, in float32."""
    behind = [{port.module for port in edge.consumers} & set(block.formats) for edge in _legal(block, step)]
    return max((sum(prod(block.shape(path)) for path in paths) for paths in behind), default=0) * FLOAT


def _share(found: Survey, block: SurveyedBlock, path: str) -> float:
    """The share of the tokens that a module sees: all, or those routed to an expert if all experts are chosen alike."""
    role = block.resolved.linears.get(path)
    experts = [each for each, other in block.resolved.linears.items() if other == role]
    starred = any(linear.role == role and "*" in linear.path for linear in found.architecture.linears)
    chosen = getattr(found.source.config.get_text_config(), "num_experts_per_tok", None) or len(experts)
    return min(1.0, chosen / len(experts)) if role is not None and starred else 1.0
