"""One model in vLLM, for vllm.py: ``python vllm_child.py DIR ASKED.json ANSWERED.json``, by an interpreter that has vLLM.

ASKED is ``{"engine": arguments of vllm.LLM, "speed": {"streams": [n, ...], "prompt": tokens, "new": tokens}, "greedy": {"prompts": [ids, ...],
"new": tokens}, "windows": [ids, ...]}``, of which all but ``engine`` may be absent. ANSWERED has for each what was found: tokens a second
(on the clock and of the processor), greedy ids, the mean loss of the next token in nats.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Engine:
    """vLLM with one model.

    Args:
        model: its directory.
        arguments: of ``vllm.LLM``.
    """

    def __init__(self, model: str, arguments: dict[str, Any]):
        from vllm import LLM

        self.llm = LLM(model, skip_tokenizer_init=True, enable_prefix_caching=False, **arguments)

    def generate(self, prompts: list[list[int]], new: int, **options: Any) -> list[Any]:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False, **options)
        return self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)

    def seconds(self, streams: int, prompt: int, new: int) -> Tensor:
        """[2]: on the clock, and of the processor, all threads together."""
        prompts = [[1 + (7 * i + j) % 90 for j in range(prompt)] for i in range(streams)]
        began = torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)
        self.generate(prompts, new)
        return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64) - began

    def speed(self, streams: list[int], prompt: int, new: int) -> dict[str, list[float]]:
        """Tokens a second, on the clock and of the processor: of ``streams`` sequences at once after their first tokens, and of
        reading one prompt."""
        self.seconds(max(streams), 16, 4)
        found = {}
        for each in streams:
            first = self.seconds(each, 16, 1)
            found[f"decode {each}"] = (each * new / (self.seconds(each, 16, new + 1) - first)).tolist()
        return found | {f"prompt {prompt}": (prompt / self.seconds(1, prompt, 1)).tolist()}

    def greedy(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        return [list(each.outputs[0].token_ids) for each in self.generate(prompts, new)]

    def loss(self, windows: list[list[int]]) -> float:
        """Mean negative log probability of each token but a window's first, in nats."""
        losses = []
        for window in windows:  # one at a time: logits of a window are large
            [output] = self.generate([window], 1, prompt_logprobs=0)
            losses += [-said[token].logprob for said, token in zip(output.prompt_logprobs[1:], window[1:], strict=True)]
        return sum(losses) / len(losses)


def main(model: str, asked: str, answered: str) -> None:
    wanted = json.loads(Path(asked).read_text())
    engine = Engine(model, wanted["engine"])
    found: dict[str, Any] = {}
    if "speed" in wanted:
        found["speed"] = engine.speed(**wanted["speed"])
    if "greedy" in wanted:
        found["greedy"] = engine.greedy(**wanted["greedy"])
    if "windows" in wanted:
        found["loss"] = engine.loss(wanted["windows"])
    Path(answered).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
