"""How the next token of a text is chosen: the three strategies of LLM-QAT (arXiv:2305.17888).

Always the likeliest token repeats itself; always sampling starts as noise, because a random first token is a bad start; so the
default takes the likeliest tokens up to a short prefix and samples the rest.

Every text draws from a generator of its own, one number for each of its tokens. So its random numbers depend on the seed and
on its number alone, not on the texts beside it and not on where a run stopped. Python's generator gives the same numbers on
every machine.

Shapes: B text, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Strategy = Literal["greedy", "sampled", "hybrid"]

PREFIXES = (3, 4, 5)
"""Tokens of the greedy start of hybrid texts in turn, the first token included; as in LLM-QAT's code."""
_EVER = 2**62


@dataclass(frozen=True)
class Sampling:
    """A way to choose tokens.

    Args:
        strategy: ``greedy``: always the likeliest; ``sampled``: always drawn; ``hybrid``: the likeliest up to a prefix of 3, 4 or
            5 tokens, then drawn.
        temperature: of what is drawn, above 0; 1: as the model says.
        top_k: draw from so many likeliest tokens; 0: from all.
        top_p: draw from the likeliest tokens that have this share together; 1: from all.
        seed: of everything drawn.

    Raises:
        ValueError: a value out of its range.
    """

    strategy: Strategy = "hybrid"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.strategy not in get_args(Strategy):
            raise ValueError(f"strategy is {self.strategy!r}: expected {', '.join(get_args(Strategy))}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}: expected more than 0; strategy greedy draws nothing")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}: expected 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: expected more than 0 and at most 1, which keeps all tokens")

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def greedy_tokens(self, turn: int) -> int:
        """How many tokens after its first one a text takes greedily; ``turn`` chooses among :data:`PREFIXES`."""
        if self.strategy == "hybrid":
            return PREFIXES[turn % len(PREFIXES)] - 1
        return _EVER if self.strategy == "greedy" else 0

    def draws(self, number: int) -> Callable[[], float]:
        """The random numbers from 0 to below 1 of text ``number``, one a call."""
        return random.Random(f"{self.seed}/text {number}").random

    def choose(self, logits_BV: Tensor, draws_B: Tensor, greedy_B: Tensor) -> tuple[Tensor, Tensor]:
        """The next token of every text.

        Args:
            logits_BV: the model's, on the CPU.
            draws_B: float64, a random number for each text.
            greedy_B: bool, the texts that take the likeliest token.

        Returns:
            The tokens, int64 ``[B]``, and the model's own probabilities of them, at temperature 1 and among all tokens,
            float64 ``[B]``.

        Raises:
            ValueError: logits that are no numbers.
        """
        own_BV = logits_BV.double().softmax(-1)
        if not bool(own_BV.isfinite().all()):
            raise ValueError("the model's logits are NaN or infinite; it cannot write text")
        token_B = own_BV.argmax(-1)
        if not bool(greedy_B.all()):
            token_B = torch.where(greedy_B, token_B, self._drawn(logits_BV, own_BV, draws_B))
        return token_B, own_BV.gather(-1, token_B[:, None])[:, 0]

    def _drawn(self, logits_BV: Tensor, own_BV: Tensor, draws_B: Tensor) -> Tensor:
        """The first token at which the cumulated weights pass a draw's share of their sum."""
        weights_BV = own_BV if self.temperature == 1 else (logits_BV.double() / self.temperature).softmax(-1)
        if 0 < self.top_k < weights_BV.shape[-1]:
            least = weights_BV.topk(self.top_k, dim=-1).values[:, -1:]
            weights_BV = weights_BV.where(weights_BV >= least, 0.0)
        if self.top_p < 1:
            sorted_BV, order = (weights_BV / weights_BV.sum(-1, keepdim=True)).sort(
                dim=-1, descending=True, stable=True
            )
            outside = sorted_BV.cumsum(-1) - sorted_BV >= self.top_p
            outside[:, 0] = False
            weights_BV = weights_BV.masked_fill(torch.zeros_like(outside).scatter_(-1, order, outside), 0.0)
        sums_BV = weights_BV.cumsum(-1)
        total_B1 = sums_BV[:, -1:]
        wanted_B1 = (draws_B[:, None] * total_B1).minimum(torch.nextafter(total_B1, torch.zeros_like(total_B1)))
        return torch.searchsorted(sums_BV, wanted_B1, right=True)[:, 0]
