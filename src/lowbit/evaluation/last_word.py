"""LAMBADA's question: the last word of a passage (arXiv:1606.06031), as lm-eval's task ``lambada_openai`` asks it.

A passage is cut at its last space. It is right (``acc``) where the model's first choices, token after token, are the last word;
``perplexity`` is of the last words, each with all its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from lowbit.evaluation.likelihood import Likelihood, Request
from lowbit.evaluation.paired import Metric, metric_of, perplexity_of


def last_word(passage: str) -> Request:
    """A passage as what stands before its last word, and the word with the space before it.

    Raises:
        ValueError: fewer than two words.
    """
    before, space, word = passage.strip().rpartition(" ")
    if not space or not before:
        raise ValueError("a passage has at least two words")
    return Request(before, f" {word}")


def last_word_metrics(answers: Sequence[Likelihood]) -> tuple[Metric, ...]:
    """The figures of the answers to passages."""
    return (
        metric_of("acc", [answer.greedy for answer in answers]),
        perplexity_of("perplexity", [answer.nats for answer in answers]),
    )
