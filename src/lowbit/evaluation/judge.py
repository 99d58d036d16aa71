"""A judge for pairs of answers: any endpoint that speaks OpenAI's chat completions.

Vicuna's bench as the quantization papers use it: the judge sees a question and two answers and gives each a score of 1 to 10. Judges
prefer the answer that they read first, so every pair is judged in both orders, and each order counts as one trial: won, tied or lost.
"""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lowbit.evaluation.chat import Answer
from lowbit.evaluation.paired import mcnemar
from lowbit.progress import Progress, silent

SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
QUESTION = """[Question]
{question}

[The Start of Assistant 1's Answer]
{first}
[The End of Assistant 1's Answer]

[The Start of Assistant 2's Answer]
{second}
[The End of Assistant 2's Answer]

Judge how helpful, relevant, accurate and detailed the two answers are. Give each assistant a score from 1 to 10, where higher is better.
Print one line with only two numbers, the scores of Assistant 1 and of Assistant 2, with a space between them. Explain your scores after
that line. The order of the answers must not matter."""
_SCORES = re.compile(r"^\W*(\d+(?:\.\d+)?)[\s,/]+(\d+(?:\.\d+)?)\b")
KEY = "OPENAI_API_KEY"


@dataclass(frozen=True)
class Verdict:
    """The judge's trials, two for each pair of answers.

    Attributes:
        judge: the judge's name.
        won, tied, lost: trials of the model against its original.
        decided: pairs in which both orders together favour one answer: those for the model and those for the original.
        p_value: of these pairs, by the exact sign test.
        unread: pairs that count nowhere, because a reply on them did not begin with two scores.
        scores: for each pair the scores of (model, original), with the model first and then with it second.
    """

    judge: str
    won: int
    tied: int
    lost: int
    decided: tuple[int, int]
    p_value: float
    unread: int
    scores: tuple[tuple[tuple[float, float], tuple[float, float]], ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dict(vars(self))


def check_judge(endpoint: str, name: str, *, timeout_s: float = 120) -> None:
    """Asks the judge for a word, so that an endpoint that is not there is found before minutes of answers.

    Raises:
        ValueError: it does not answer.
    """
    messages = [{"role": "user", "content": "Answer with the word yes."}]
    _ask(_address(endpoint), {"model": name, "messages": messages, "temperature": 0, "max_tokens": 8}, timeout_s)


def judge_answers(
    answers: Sequence[Answer], endpoint: str, name: str, *, timeout_s: float = 120, progress: Progress = silent
) -> Verdict:
    """Lets a judge score all pairs of answers, in both orders.

    Args:
        answers: of :func:`lowbit.evaluation.chat.compare_chat`.
        endpoint: the base address, such as ``http://localhost:8000/v1``. The key, if it wants one, is read from the environment
            variable ``OPENAI_API_KEY``.
        name: the judging model, as the endpoint knows it.
        timeout_s: seconds for one answer of the judge.
        progress: called as ``progress(trials done, trials, what)``.

    Raises:
        ValueError: an endpoint that does not answer, or of whose replies none on both orders of a pair begins with two scores.
    """
    scores, unread = [], []
    for done, answer in enumerate(answers):
        progress(2 * done, 2 * len(answers), "judging")
        first = _trial(endpoint, name, answer.prompt, answer.model, answer.original, timeout_s)
        progress(2 * done + 1, 2 * len(answers), "judging")
        second = _trial(endpoint, name, answer.prompt, answer.original, answer.model, timeout_s)
        replies = [reply for reply in (first, second) if isinstance(reply, str)]
        if replies:
            unread.append(replies[0])
        else:
            scores.append((first, second[::-1]))
    progress(2 * len(answers), 2 * len(answers), "judging")
    if unread and not scores:
        raise ValueError(
            f"the judge {name} answered {unread[0][:80]!r}: expected two scores of 1 to 10 in its first line. Small models seldom judge; "
            "take a larger one"
        )
    trials = [trial for pair in scores for trial in pair]
    sums = [sum(ours - theirs for ours, theirs in pair) for pair in scores]
    better, worse = sum(each > 0 for each in sums), sum(each < 0 for each in sums)
    return Verdict(
        judge=name,
        won=sum(ours > theirs for ours, theirs in trials),
        tied=sum(ours == theirs for ours, theirs in trials),
        lost=sum(ours < theirs for ours, theirs in trials),
        decided=(better, worse),
        p_value=mcnemar(worse, better),
        unread=len(unread),
        scores=tuple(scores),
    )


def _trial(
    endpoint: str, name: str, question: str, first: str, second: str, timeout_s: float
) -> tuple[float, float] | str:
    """The two scores, or a reply without them."""
    asked = QUESTION.format(question=question, first=first, second=second)
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": asked}]
    body = {"model": name, "messages": messages, "temperature": 0, "max_tokens": 512}
    reply = _ask(_address(endpoint), body, timeout_s)
    found = _SCORES.match(reply.strip())
    if found is None or not all(1 <= float(score) <= 10 for score in found.groups()):
        return reply
    return float(found[1]), float(found[2])


def _address(endpoint: str) -> str:
    return f"{endpoint.rstrip('/')}/chat/completions"


def _ask(address: str, body: dict[str, Any], timeout_s: float) -> str:
    if not address.startswith(("http://", "https://")):
        raise ValueError(f"the judge's address is {address!r}: expected http:// or https://")
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as reply:
            return str(json.load(reply)["choices"][0]["message"]["content"])
    except urllib.error.HTTPError as error:
        raise ValueError(f"the judge at {address} answered {error.code} {error.reason}") from error
    except (OSError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"the judge at {address} gave no answer ({type(error).__name__}: {error})") from error
