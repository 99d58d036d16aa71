"""Peak memory of a run: an estimate from shapes, term by term.

One of four moments is the peak. Each holds

    start      P + A + E + B                     the first block's inputs are made
    block      P + A + B + L + max over steps of what the step says that it holds (Step.peak)
    compare    P + A + O + 8 V                   the logits of both models, window by window
    reload     P + A + O + Q + 6 V               the finished checkpoint, packed, against the logits kept

Fisher information adds two moments, with an array of activations for every block in A:

    loss       P + A + O + 6 V                   the gradient after the last block
    gradients  P + A + 2 B + G + 3 W             a block, its squares, its largest gradient (G), one window (W)

P is the process itself (Python, torch, transformers: measured). A is the activations of the calibration set: three to five
float32 arrays ``[N, T, d]``, each of the windows that something reads (:mod:`lowbit.plan.streams`), as far as they fit in the
user's limit; the rest is in files. B is the largest block in
float32, L its largest tensor as stored, O everything outside the blocks in float32 and E the same without the head, Q
the packed layers, V the logits of one window in float32. Where unquantized tensors are kept in a narrower dtype (``keep_dtype``),
O is there once more at the start and in the comparison. A stage that trains the packed model adds one moment,

    train      P + A + 2 O + Q + C + b (8 V + n W) + 4 D + F + M

and one that calibrates the cache another

    calibrate  P + Q + O + w + S                 the packed model, a window in one block, and the sums of every layer

with C a byte for each weight (its code), b windows at once through n blocks, D the largest layer in float32, F the numbers that the
choice of parameters holds for each weight, and M the whole original where text beyond the calibration windows is trained on.

A step holds, all at once:

* a window's activations on each thread, twice, because the allocator keeps about as much again of what a thread frees;
* statistics: each statistic of each shared input (the statistic itself gives its size), and the largest of those that a
  batch makes once more before it is added (a Gram matrix takes a batch in place);
* a search: inputs and outputs of the modules that judge it, over its calibration windows, and three copies of the
  weights of one edge's consumers; a search for channels to split and merge: four matrices of an input's width;
* learning: eight copies of the weights and of one batch's activations, for the backward pass; for each original block that it
  looks ahead to, the block and three copies of a batch's activations.

Solving is another account, because it ends what it holds as it goes (``Solve.peak``). Either windows pass, with all
statistics; or one linear is solved, with the statistics of inputs that are still to be solved and a block in which the
linears before it are packed already. The widest input comes last. A solver holds three float32 copies of the weight. The
column solver holds the factor, which is one matrix of the input's width, in float64 up to 8,192 channels and in float32
beyond, and one and a half copies of the weight; further copies are for outliers, greedy passes and static groups
(``Gptq.memory``). The matrix itself is among the statistics. Tests count these allocations.

This is an estimate, because allocators round up and keep freed memory. GPTQ on random models (16 windows of 512 tokens, two
threads) peaked at 1.1 times the estimate at a width of 960, and one block of a 7B shape (8 windows) at 1.0 times.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from lowbit.data import held_out_windows
from lowbit.plan.cache import calibrated_heads
from lowbit.plan.model_plan import BlockPlan, ModelPlan, outside_bytes
from lowbit.plan.streams import stream_windows
from lowbit.recipes import Train
from lowbit.steps.step import FLOAT, RunSizes

PROCESS = 520 * 2**20
"""Bytes of a process that has imported everything and run a tiny model."""


def activation_bytes(plan: ModelPlan, tokens: Iterable[int], ram_limit: int) -> tuple[int, int]:
    """Bytes of float32 arrays of the hidden states of so many ``tokens`` each: (in memory, in files).

    Each array is in memory if it still fits the limit, as the store decides.
    """
    ram = disk = 0
    for count in tokens:
        size = count * plan.source.config.get_text_config().hidden_size * FLOAT
        if ram + size <= ram_limit:
            ram += size
        else:
            disk += size
    return ram, disk


def stream_tokens(plan: ModelPlan, samples: int, seq_len: int, *, fisher: bool = False) -> list[int]:
    """Tokens of each array of hidden states, in the order in which they are made; ``fisher``: while Fisher information is
    made, with an array for every block."""
    held_out = held_out_windows(samples) if samples and plan.recipe.reads_text else 0
    windows = stream_windows(plan.recipe, samples, held_out, seq_len, original=fisher)
    named = ("fp", "quant", "next", "ahead", *(["packed"] if plan.outside.embeddings else []))
    return [len(windows[name]) * seq_len for name in named] + [samples * seq_len] * len(plan.blocks) * fisher


def peak_disk_bytes(plan: ModelPlan, samples: int, seq_len: int, ram_limit: int) -> int:
    """Bytes of temporary files: activations beyond the limit, and Fisher information if the recipe needs it."""
    fisher, latents = plan.recipe.needs_fisher, plan.recipe.needs_latents
    weights = sum(prod(block.shapes[path]) for block, path, _ in plan.layers) * FLOAT
    trained = latents * 5 * weights  # where they start, and the state of a training: leaves, the best ones, two moments
    streams = activation_bytes(plan, stream_tokens(plan, samples, seq_len, fisher=fisher), ram_limit)[1]
    return streams + fisher * weights + trained


def peak_parts(plan: ModelPlan, samples: int, seq_len: int, ram_limit: int) -> dict[str, dict[str, int]]:
    """Bytes of each moment's terms (see the module docstring). The peak is the largest sum."""
    if not plan.recipe.changes_weights:
        return _whole_parts(plan, samples, seq_len)
    streams = stream_tokens(plan, samples, seq_len)
    held = {"process": PROCESS, "activations": activation_bytes(plan, streams, ram_limit)[0]}
    worst = max(plan.blocks, key=lambda block: _block_bytes(block) + _largest_step(plan, block, samples, seq_len)[1])
    step, need = _largest_step(plan, worst, samples, seq_len)
    largest = max(p.numel() for p in worst.module.parameters()) * plan.source.dtype.itemsize
    block = {"block": _block_bytes(worst), "largest tensor": largest, f"step {step}": need}
    if not samples:
        return {"block": held | block}
    outside = outside_bytes(plan, FLOAT)
    logits = seq_len * plan.source.config.get_text_config().vocab_size * FLOAT
    again = outside if plan.kept.narrows else 0  # as stored, in float32 too
    packed = sum(plan.description(layer).nbytes for *_, layer in plan.layers)
    tables = sum(layer.nbytes for layer in plan.outside.stored.values())
    fisher = _fisher_parts(plan, worst, samples, seq_len, ram_limit) if plan.recipe.needs_fisher else {}
    train = _train_parts(plan, worst, seq_len, held, packed)
    read_back = {"read back for its cache": packed + outside} if plan.recipe.scheme.cache else {}
    fit = _fit_parts(plan, seq_len, packed + outside) if plan.recipe.cache_stages else {}
    return (fisher | train | fit) | {
        "start": held | {"embeddings": _base_bytes(plan), "block": _block_bytes(plan.blocks[0]), "rounded": again},
        "block": held | block,
        "compare": held
        | {"outside the blocks": outside, "rounded": again, "packed outside": tables, "logits": 8 * logits}
        | read_back,
        "reload": held | {"outside the blocks": outside, "packed layers": packed, "logits": 6 * logits},
    }


def _whole_parts(plan: ModelPlan, samples: int, seq_len: int) -> dict[str, dict[str, int]]:
    """Of a run that writes the model as it is and reads it back whole to measure its cache."""
    largest = max(sum(p.nbytes for p in block.module.parameters()) for block in plan.blocks)
    write = {"process": PROCESS, "block or what is outside": max(largest, outside_bytes(plan))}
    if not samples:
        return {"write": write}
    model = outside_bytes(plan, FLOAT) + sum(_block_bytes(block) for block in plan.blocks)
    logits = seq_len * plan.source.config.get_text_config().vocab_size * FLOAT
    fit = _fit_parts(plan, seq_len, model) if plan.recipe.cache_stages else {}
    return {"write": write, "compare": {"process": PROCESS, "model": model, "logits": 8 * logits}} | fit


def _fit_parts(plan: ModelPlan, seq_len: int, model: int) -> dict[str, dict[str, int]]:
    """Of calibrating the cache: the model, a window in one block, and the sums of every layer."""
    stages, worst = plan.recipe.cache_stages, max(plan.blocks, key=_block_bytes)
    window = 2 * run_sizes(plan, worst, 1, seq_len).window_bytes
    sums = max(
        sum(stage.fit.nbytes(*size) for size in calibrated_heads(plan.source.config, plan.recipe.scheme.cache))
        for stage in stages
    )
    return {"calibrate cache": {"process": PROCESS, "model": model, "a window": int(window), "sums": sums}}


def _train_parts(
    plan: ModelPlan, worst: BlockPlan, seq_len: int, held: dict[str, int], packed: int
) -> dict[str, dict[str, int]]:
    stages = [stage for stage in plan.recipe.stages if isinstance(stage, Train)]
    if not stages:
        return {}
    batch = max(stage.batch for stage in stages)
    logits = seq_len * plan.source.config.get_text_config().vocab_size * FLOAT
    weights = sum(prod(block.shapes[path]) for block, path, _ in plan.layers)
    sizes, blocks = run_sizes(plan, worst, 1, seq_len), len(plan.blocks)
    kept = blocks * sizes.window_bytes
    if all(stage.recompute for stage in stages):
        kept = sizes.window_bytes + blocks * seq_len * sizes.hidden * FLOAT
    floats = max(stage.what.floats_per_weight for stage in stages)
    original = outside_bytes(plan, FLOAT) + sum(_block_bytes(block) for block in plan.blocks)
    return {
        "train": held
        | {
            "outside the blocks, packed and original": 2 * outside_bytes(plan, FLOAT),
            "packed layers": packed,
            "codes": weights,
            "logits": 8 * batch * logits,
            "activations of a batch": int(batch * kept),
            "weights in training": floats * weights * FLOAT,
            "original": original if any(stage.tokens and stage.compares for stage in stages) else 0,
            "decoded layer": 4 * FLOAT * max((prod(worst.shapes[path]) for path in worst.formats), default=0),
        }
    }


def _fisher_parts(
    plan: ModelPlan, worst: BlockPlan, samples: int, seq_len: int, ram_limit: int
) -> dict[str, dict[str, int]]:
    boundaries = activation_bytes(plan, stream_tokens(plan, samples, seq_len, fisher=True), ram_limit)[0]
    held = {"process": PROCESS, "activations": boundaries}
    logits = seq_len * plan.source.config.get_text_config().vocab_size * FLOAT
    largest = max((prod(worst.shapes[path]) for path in worst.formats), default=0) * FLOAT
    return {
        "loss": held | {"outside the blocks": outside_bytes(plan, FLOAT), "logits": 6 * logits},
        "gradients": held
        | {
            "block": _block_bytes(worst),
            "squares": _block_bytes(worst),
            "largest gradient": largest,
            "window": int(3 * run_sizes(plan, worst, 1, seq_len).window_bytes),
        },
    }


def _block_bytes(block: BlockPlan) -> int:
    return sum(p.numel() for p in block.module.parameters()) * FLOAT


def _base_bytes(plan: ModelPlan) -> int:
    prefix, base = f"{plan.architecture.blocks}.", f"{plan.model.base_model_prefix}."
    named = plan.model.named_parameters()
    return sum(p.numel() for name, p in named if name.startswith(base) and not name.startswith(prefix)) * FLOAT


def _largest_step(plan: ModelPlan, block: BlockPlan, samples: int, seq_len: int) -> tuple[str, int]:
    sizes = run_sizes(plan, block, samples, seq_len)
    steps = [(type(step).__name__, int(step.peak(sizes))) for step in plan.recipe.steps]
    return max(steps, key=lambda size: size[1])


def run_sizes(plan: ModelPlan, block: BlockPlan, samples: int, seq_len: int) -> RunSizes:
    """The sizes of a run with ``samples`` calibration windows, at one block."""
    hidden = plan.source.config.get_text_config().hidden_size
    shares = {path: _share(plan, block, path) for path in block.resolved.linears}
    return RunSizes(block.description, block.shapes, samples, seq_len, hidden, shares)


def _share(plan: ModelPlan, block: BlockPlan, path: str) -> float:
    """The share of the tokens that reach a linear: 1, or an expert's share if all experts are chosen equally often."""
    role = block.resolved.linears[path]
    experts = [each for each, other in block.resolved.linears.items() if other == role]
    starred = any(linear.role == role and "*" in linear.path for linear in plan.architecture.linears)
    chosen = getattr(plan.source.config.get_text_config(), "num_experts_per_tok", None) or len(experts)
    return min(1.0, chosen / len(experts)) if starred else 1.0
