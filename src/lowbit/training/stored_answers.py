"""What the original says of a text, kept instead of the original: its likeliest tokens at each position.

Training towards the original's distribution needs it for every window again, and the original takes the memory of a whole model. A
few likeliest tokens hold nearly all of its mass; what they leave is spread evenly over all other tokens. So every objective
reads a whole distribution, and what is lost is one number, which is measured.

Shapes: N window, T token, K stored token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowbit.progress import Progress, silent
from lowbit.training.objectives import Answer

_LEAST = 1e-6
"""Mass of all other tokens at least: float16 makes sums that are 1 and a little more."""


@dataclass(frozen=True, eq=False)
class StoredAnswers:
    """The likeliest K tokens at each position of some windows.

    Attributes:
        token_NTK: int32.
        logp_NTK: their log-probabilities, float16.
        vocabulary: V.
        lost: mean KL divergence of this from the original's distribution, in nats a token.
    """

    token_NTK: Tensor
    logp_NTK: Tensor
    vocabulary: int
    lost: float

    @staticmethod
    def of(original: Callable[[int], Answer], count: int, k: int, progress: Progress = silent) -> StoredAnswers:
        """The answers of ``original`` for the first ``count`` windows."""
        tokens, logps, lost, vocabulary = [], [], 0.0, 0
        for i in range(count):
            logp_TV = original(i).logits_TV.float().log_softmax(-1)
            vocabulary = logp_TV.shape[1]
            top = logp_TV.topk(min(k, vocabulary), dim=-1)
            tokens.append(top.indices.to(torch.int32))
            logps.append(top.values.half())
            stored_TV = _spread(tokens[-1], logps[-1], vocabulary)
            lost += (logp_TV.exp() * (logp_TV - stored_TV)).sum(-1).double().mean().item() / count
            progress(i + 1, count, "asking the original, once")
        return StoredAnswers(torch.stack(tokens), torch.stack(logps), vocabulary, lost)

    def __call__(self, i: int) -> Answer:
        """The answer for window i: log-probabilities ``[T, V]`` as logits."""
        return Answer(_spread(self.token_NTK[i], self.logp_NTK[i], self.vocabulary))

    def save(self, path: Path) -> None:
        """Writes a file that :meth:`load` reads."""
        numbers = torch.tensor([self.vocabulary, self.lost], dtype=torch.float64)
        save_file({"token": self.token_NTK, "logp": self.logp_NTK, "numbers": numbers}, path)

    @staticmethod
    def load(path: Path) -> StoredAnswers | None:
        """What was saved; None: nothing that can be read."""
        try:
            held = load_file(path)
            return StoredAnswers(held["token"], held["logp"], int(held["numbers"][0]), float(held["numbers"][1]))
        except Exception:  # safetensors reports damage by errors of several types
            return None


def _spread(token_TK: Tensor, logp_TK: Tensor, vocabulary: int) -> Tensor:
    """Log-probabilities ``[T, V]`` of stored tokens and, evenly, of all others."""
    logp_TK = logp_TK.float()
    rest_T1 = (1 - logp_TK.exp().sum(-1, keepdim=True)).clamp(min=_LEAST)
    each_T1 = (rest_T1 / max(1, vocabulary - token_TK.shape[1])).log()
    return each_T1.expand(-1, vocabulary).scatter(1, token_TK.long(), logp_TK).log_softmax(-1)
