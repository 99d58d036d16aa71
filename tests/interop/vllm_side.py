"""What vLLM makes of prompts: ``python vllm_side.py DIR ASKED.json ANSWERED.json``, by an interpreter that has vLLM.

ASKED is ``{"prompts": [token ids, ...], "new": tokens, "engine": arguments of vllm.LLM}``. ANSWERED is, for each prompt, the ids and
log probabilities of its greedy tokens.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main(model: str, asked: str, answered: str) -> None:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    wanted = json.loads(Path(asked).read_text())
    engine = LLM(model, skip_tokenizer_init=True, **wanted["engine"])
    sampling = SamplingParams(temperature=0.0, max_tokens=wanted["new"], ignore_eos=True, logprobs=1, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in wanted["prompts"]], sampling, use_tqdm=False)
    made = [
        {
            "ids": list(output.outputs[0].token_ids),
            "logprobs": [step[i].logprob for i, step in zip(output.outputs[0].token_ids, output.outputs[0].logprobs)],
        }
        for output in outputs
    ]
    Path(answered).write_text(json.dumps(made))


if __name__ == "__main__":
    main(*sys.argv[1:])
