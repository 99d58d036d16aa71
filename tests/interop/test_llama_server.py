"""llama.cpp's HTTP server on an exported file: greedy tokens over the network are those that are computed here."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import pytest
import torch

import lowbit
from lowbit.checkpoints.formats.gguf import FILE

from engines import LLAMA_CPP, LlamaCpp

pytest.importorskip(LLAMA_CPP)

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time there was a small dragon who",
    "Water boils at",
    "The largest planet of the solar system is",
    "To make bread you need",
    "import numpy as np",
    "The Second World War ended in",
    "A prime number is a number that",
    "Dear Sir or Madam,",
    "The opposite of hot is",
    "In 1969, Neil Armstrong",
    "SELECT name FROM users WHERE",
    "My favourite season is autumn because",
    "The mitochondria are",
    "She opened the door and",
    "Photosynthesis is the process by which",
    "One, two, three, four,",
    "The speed of light is",
    "Translate into French: Good morning",
]
NEW = 12
NEAR_TIE = 0.02  # nats between two tokens, in F16


def asked(url: str, path: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.loads(response.read())


@pytest.mark.slow
def test_the_server_continues_20_prompts_with_our_own_greedy_tokens(tmp_path):
    lowbit.export("smollm2-135m", "gguf:f16", out=tmp_path / "out")
    engine = LlamaCpp(tmp_path / "out" / FILE)
    assert asked(engine.url, "/health") == {"status": "ok"}
    model, tokenizer = lowbit.load("smollm2-135m", dtype=torch.float32), lowbit.load_tokenizer("smollm2-135m")
    equal = 0
    for prompt in PROMPTS:
        ids = tokenizer(prompt).input_ids
        body = {"prompt": prompt, "n_predict": NEW, "temperature": 0, "n_probs": 1, "cache_prompt": False}
        answer = asked(engine.url, "/completion", body)
        chosen = [step["id"] for step in answer["completion_probabilities"]]
        assert chosen and answer["tokens_evaluated"] == len(ids)  # the same tokens of the prompt
        with torch.no_grad():
            rows = model(torch.tensor([ids + chosen])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        lost = [(row.max() - row[i]).item() for row, i in zip(rows, chosen, strict=True)]
        assert max(lost) <= NEAR_TIE, (prompt, lost)
        equal += max(lost) == 0
    assert equal >= 18, f"{equal} of {len(PROMPTS)} prompts without a near tie"
