"""Checks of what perplexity does not show of a quantized cache: finding facts in a long prompt, and generating from it.

Perplexity is mostly about near tokens. A damaged cache shows first where an answer stands far back in the prompt
(retrieval), and where one wrong token spoils the rest (copying, counting, arithmetic). Retrieval alone hides damage: caches
that find everything still lose at reasoning.

All data is made here from a seed. Each check is run twice on the same weights, through the model's quantized cache and
without it, because a small model may fail in full precision too.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowbit.checkpoints.config import check_positions
from lowbit.evaluation.forward import evaluating, logits_of
from lowbit.progress import Progress, silent

PAIRS, PROMPTS = 8, 4
"""Facts in a prompt of the retrieval check, and its prompts of each length."""
GENERATED = 8
"""Prompts of each generation check."""
_NAMES = (
    "amber birch cedar coral delta ember falcon garnet harbor indigo juniper kestrel lantern maple nectar onyx".split()
)
_WORDS = (
    "river table green window paper music garden yellow market stone winter silver bridge orange forest letter summer bottle "
    "doctor engine flower island jacket kitchen ladder mirror needle ocean pencil rabbit"
).split()
_WHO = "The farmer,My neighbour,A young teacher,The old sailor,Her cousin,The baker,A tired painter,The nurse".split(
    ","
)
_DID = "walked to,looked at,talked about,painted,remembered,drove past,dreamed of,returned to".split(",")
_WHAT = "the quiet harbour,a small village,the long road,the green hills,an empty station,the town library,a wooden bridge".split(
    ","
)
_WHEN = "in the morning,after lunch,before the storm,on Sunday,late at night,in early spring,during the holidays".split(
    ","
)


@dataclass(frozen=True)
class CheckScore:
    """One check.

    Attributes:
        name: ``retrieval``, ``copying``, ``counting`` or ``arithmetic``.
        tokens: the longest prompt.
        answers: answers asked for.
        solved, solved_floating: share of them that are right in every token, through the cache and without it.
        nll, nll_floating: nats for each token of the right answers, for retrieval; None for generated answers.
    """

    name: str
    tokens: int
    answers: int
    solved: float
    solved_floating: float
    nll: float | None = None
    nll_floating: float | None = None


def check_lengths(model: PreTrainedModel, tokenizer: Any, lengths: Sequence[int], *, seed: int = 0) -> None:
    """Refuses prompts that :func:`check_retrieval` could not make, before anything is measured.

    Raises:
        ValueError: a length beyond the model's positions, or too short for the facts.
    """
    for length in lengths:
        check_positions(model, length, f"a prompt of {length} tokens")
        for i in range(PROMPTS):
            _facts(tokenizer, length, random.Random(f"{seed}/{length}/{i}"))


def check_retrieval(
    model: PreTrainedModel, tokenizer: Any, lengths: Sequence[int], *, seed: int = 0, progress: Progress = silent
) -> tuple[CheckScore, ...]:
    """Whether the model still knows facts that stand in prompts of ``lengths`` tokens, between sentences about other things.

    A prompt hides ``PAIRS`` sentences such as ``The code of amber is 4821.`` and ends with all of them, in another order; an
    answer is right if each of its tokens is the model's first choice after what stands before it.

    Raises:
        ValueError: a length beyond the model's positions, or too short for the facts.
    """
    check_lengths(model, tokenizer, lengths, seed=seed)
    scores, total = [], len(lengths) * PROMPTS
    with evaluating(model):
        for i, length in enumerate(lengths):
            found = []
            for j in range(PROMPTS):
                progress(i * PROMPTS + j, total, f"retrieval at {length} tokens")
                found += _retrieve(model, *_facts(tokenizer, length, random.Random(f"{seed}/{length}/{j}")))
            scores.append(_score("retrieval", length, found))
    progress(total, total, "retrieval")
    return tuple(scores)


def check_generation(
    model: PreTrainedModel, tokenizer: Any, *, seed: int = 0, progress: Progress = silent
) -> tuple[CheckScore, ...]:
    """Whether the model copies a list, goes on counting, and adds as its examples do; answers are generated greedily.

    Raises:
        ValueError: a model whose positions do not hold the prompts.
    """
    makers = {"copying": _copying, "counting": _counting, "arithmetic": _arithmetic}
    scores, total = [], len(makers) * GENERATED
    with evaluating(model):
        for i, (name, make) in enumerate(makers.items()):
            solved, longest = [], 0
            for j in range(GENERATED):
                progress(i * GENERATED + j, total, name)
                prompt, answer = make(random.Random(f"{seed}/{name}/{j}"))
                start, whole = _ids(tokenizer, prompt), _ids(tokenizer, prompt + answer)
                check_positions(model, len(whole), f"a check of {len(whole)} tokens")
                longest = max(longest, len(start))
                wanted = whole[len(start) :]
                solved.append([torch.equal(each, wanted) for each in _generated(model, start, len(wanted), tokenizer)])
            packed, floating = (sum(column) / len(solved) for column in zip(*solved, strict=True))
            scores.append(CheckScore(name, longest, len(solved), packed, floating))
    progress(total, total, "generation")
    return tuple(scores)


def _facts(tokenizer: Any, length: int, draw: random.Random) -> tuple[Tensor, list[range]]:
    """A prompt of ``length`` tokens, and where the answers at its end stand."""
    names = draw.sample(_NAMES, PAIRS)
    starts = {name: _ids(tokenizer, f" The code of {name} is") for name in names}
    facts = {name: _ids(tokenizer, f" The code of {name} is {draw.randint(1000, 9999)}.") for name in names}
    room = length - 2 * sum(map(len, facts.values()))
    if room < PAIRS:
        raise ValueError(f"a prompt of {length} tokens does not hold {PAIRS} facts and questions; ask for longer ones")
    pieces: list[Tensor] = []
    for i, fact in enumerate([*facts.values(), None]):
        pieces.append(_filler(tokenizer, room * (i + 1) // (PAIRS + 1) - room * i // (PAIRS + 1), draw))
        pieces += [] if fact is None else [fact]
    answers, at = [], sum(map(len, pieces))
    for name in draw.sample(names, PAIRS):
        answers.append(range(at + len(starts[name]), at + len(facts[name])))
        at += len(facts[name])
        pieces.append(facts[name])
    return torch.cat(pieces), answers


def _filler(tokenizer: Any, count: int, draw: random.Random) -> Tensor:
    """``count`` tokens of sentences about nothing."""
    ids = torch.empty(0, dtype=torch.int64)
    while len(ids) < count:
        ids = torch.cat([ids, _ids(tokenizer, _sentences(draw, 50))])
    return ids[:count]


def _sentences(draw: random.Random, count: int) -> str:
    parts = (_WHO, _DID, _WHAT, _WHEN)
    return "".join(" " + " ".join(draw.choice(part) for part in parts) + "." for _ in range(count))


def _retrieve(model: PreTrainedModel, ids: Tensor, answers: list[range]) -> list[tuple[tuple[bool, float, int], ...]]:
    """For each answer, through the cache and without it: whether it is right, nats and tokens."""
    kept = len(ids) - answers[0].start + 1
    both = [logits_of(model, ids, cached=cached, last=kept).float().cpu() for cached in (True, False)]
    found = []
    for answer in answers:
        places = torch.tensor(answer) - 1 - (len(ids) - kept)
        wanted = ids[answer.start : answer.stop]
        found.append(
            tuple(
                (
                    torch.equal(logits[places].argmax(-1), wanted),
                    torch.nn.functional.cross_entropy(logits[places], wanted, reduction="sum").item(),
                    len(wanted),
                )
                for logits in both
            )
        )
    return found


def _score(name: str, tokens: int, found: list[tuple[tuple[bool, float, int], ...]]) -> CheckScore:
    solved = [sum(right for right, *_ in column) / len(found) for column in zip(*found, strict=True)]
    nats = [sum(nll for _, nll, _ in column) / sum(n for *_, n in column) for column in zip(*found, strict=True)]
    return CheckScore(name, tokens, len(found), solved[0], solved[1], nats[0], nats[1])


def _copying(draw: random.Random) -> tuple[str, str]:
    words = draw.sample(_WORDS, 12)
    listed, begun = ", ".join(words), ", ".join(words[:4])
    return f"The list: {listed}.\n{_sentences(draw, 20)}\nThe list: {begun},", f"{listed.removeprefix(begun)[1:]}."


def _counting(draw: random.Random) -> tuple[str, str]:
    start, step = draw.randint(100, 300), draw.choice((1, 2, 5, 10))
    numbers = [str(start + step * i) for i in range(88)]
    return ", ".join(numbers[:72]) + ",", "".join(f" {each}," for each in numbers[72:])


def _arithmetic(draw: random.Random) -> tuple[str, str]:
    lines = []
    for _ in range(49):
        a, b = draw.randint(1, 9), draw.randint(1, 9)
        lines.append((f"{a} + {b} =", f" {a + b}\n"))
    return "".join(f"{question}{answer}" for question, answer in lines[:-1]) + lines[-1][0], lines[-1][1]


@torch.no_grad()
def _generated(model: Any, start: Tensor, count: int, tokenizer: Any) -> list[Tensor]:
    """``count`` tokens after ``start``, through the model's quantized cache and with transformers' own."""
    ids = start[None].to(model.device)
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "eos_token_id": None}
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    outputs = []
    for options in ({}, {"cache_implementation": "dynamic"}):
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            pad_token_id=pad,
            **greedy,
            **options,
        )
        outputs.append(out[0, len(start) :].cpu())
    return outputs


def _ids(tokenizer: Any, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
