"""Tokens per second: prefill (the prompt in one forward pass) and decode (one token at a time on the KV cache).

The two have different limits, arithmetic and memory bandwidth. A packed model can win one and lose the other, so they
are never averaged. A pass is a prefill, which computes only the last position's logits if the model can (as in
`generate`), and then `new_tokens` greedy steps on the filled cache. One full pass warms up and is not counted; figures
are medians over the others. The prompt is random ids, because a dense model's time depends only on their number.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lowbit.checkpoints.config import check_positions
from lowbit.decoding import cache_argument
from lowbit.evaluation.forward import evaluating, vocabulary_size
from lowbit.progress import Progress

PILOT_PROMPT, PILOT_STEPS = 16, 2


@dataclass(frozen=True)
class Speed:
    """Medians over `repeats` passes, and the tokens of a pass, which a budget may have reduced."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    prompt_tokens: int
    new_tokens: int
    repeats: int

    def to_dict(self) -> dict[str, float | int]:
        """The fields by name, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """The number of tokens and passes to time."""

    prompt_tokens: int
    new_tokens: int
    repeats: int


def measure_speed(
    model: PreTrainedModel,
    prompt_tokens: int = 512,
    new_tokens: int = 16,
    repeats: int = 3,
    *,
    time_budget_s: float | None = None,
    make_cache: Callable[[], Any] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Speed:
    """Times prefill and decode of a transformers causal LM at batch 1.

    Args:
        model: the model, on the device to measure.
        prompt_tokens: ids in the prompt.
        new_tokens: decode steps, each a forward pass of one token.
        repeats: counted passes.
        time_budget_s: seconds for everything; a short pilot decides how many passes and tokens fit, and the result
            gives their numbers. None: no limit.
        make_cache: makes an empty KV cache; None: transformers' DynamicCache.
        seed: of the prompt's ids.
        progress: called as progress(done, total, description) around passes.

    Raises:
        ValueError: a count below 1, or more positions than the model has.
    """
    if min(prompt_tokens, new_tokens, repeats) < 1:
        raise ValueError(f"each must be at least 1, found {prompt_tokens=}, {new_tokens=}, {repeats=}")
    check_positions(model, prompt_tokens + new_tokens, f"{prompt_tokens} prompt + {new_tokens} new tokens")
    generator = torch.Generator().manual_seed(seed)
    prompt_T = torch.randint(vocabulary_size(model), (prompt_tokens,), generator=generator).to(model.device)
    make_cache = make_cache or (lambda: DynamicCache(config=model.config))
    plan = Plan(prompt_tokens, new_tokens, repeats)
    passes = []
    with evaluating(model):
        if time_budget_s is not None:
            plan = _pilot(model, prompt_T, plan, make_cache, time_budget_s)
        total = plan.repeats + 1
        for done in range(total):
            if progress:
                progress(done, total, "speed")
            passes.append(_timed_pass(model, prompt_T[: plan.prompt_tokens], plan.new_tokens, make_cache()))
    if progress:
        progress(total, total, "speed")
    prefill_s, decode_s = zip(*passes[1:], strict=True)
    return Speed(
        prefill_tokens_per_s=plan.prompt_tokens / median(prefill_s),
        decode_tokens_per_s=plan.new_tokens / median(decode_s),
        prompt_tokens=plan.prompt_tokens,
        new_tokens=plan.new_tokens,
        repeats=plan.repeats,
    )


def fit_budget(plan: Plan, prompt_token_s: float, new_token_s: float, budget_s: float) -> Plan:
    """The plan that fits `budget_s`, including the warm-up pass: first fewer repeats, then fewer tokens.

    Args:
        plan: the requested plan.
        prompt_token_s, new_token_s: seconds of one prompt token and of one decode step.
        budget_s: seconds for all passes.

    Returns:
        A plan with at least one repeat of one prompt token and one step, even if that exceeds the budget.
    """
    pass_s = plan.prompt_tokens * prompt_token_s + plan.new_tokens * new_token_s
    passes = int(budget_s / pass_s)
    if passes >= 2:
        return Plan(plan.prompt_tokens, plan.new_tokens, min(plan.repeats, passes - 1))
    share_s = budget_s / 4  # two passes, half of each for either phase
    return Plan(
        min(plan.prompt_tokens, max(1, int(share_s / prompt_token_s))),
        min(plan.new_tokens, max(1, int(share_s / new_token_s))),
        repeats=1,
    )


def _pilot(
    model: PreTrainedModel, prompt_T: Tensor, plan: Plan, make_cache: Callable[[], Any], budget_s: float
) -> Plan:
    """Fits the plan by one short pass to warm up and one to time.

    Long prompts cost less per token, so the plan errs on the short side.
    """
    start = time.perf_counter()
    prompt_tokens, steps = min(PILOT_PROMPT, plan.prompt_tokens), min(PILOT_STEPS, plan.new_tokens)
    _timed_pass(model, prompt_T[:prompt_tokens], steps, make_cache())
    prefill_s, decode_s = _timed_pass(model, prompt_T[:prompt_tokens], steps, make_cache())
    left_s = max(0.0, budget_s - (time.perf_counter() - start))
    return fit_budget(plan, prefill_s / prompt_tokens, decode_s / steps, left_s)


def _timed_pass(model: PreTrainedModel, prompt_T: Tensor, new_tokens: int, cache: Any) -> tuple[float, float]:
    """(seconds of the prefill, seconds of `new_tokens` greedy steps)."""
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    caching = {"use_cache": True, cache_argument(model): cache}
    start = _now(prompt_T.device)
    logits = model(input_ids=prompt_T[None], **caching, **last_only).logits
    prefilled = _now(prompt_T.device)
    for _ in range(new_tokens):
        token = logits[:, -1:].argmax(-1)
        logits = model(input_ids=token, **caching).logits
    return prefilled - start, _now(prompt_T.device) - prefilled


def _now(device: torch.device) -> float:
    """Seconds, after the device has finished all its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
