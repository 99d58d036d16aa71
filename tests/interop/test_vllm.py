"""vLLM, with the plug-in, generates from packed checkpoints what lowbit does: the same tokens, or another one of two that tie.

vLLM needs an older transformers, so it runs in a process of its own: LOWBIT_VLLM_PYTHON is an interpreter that has it
(docs/serving.md says how to make one).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit

from helpers import VOCABULARY, tiny_llama

PYTHON = os.environ.get("LOWBIT_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="LOWBIT_VLLM_PYTHON names no interpreter with vLLM (docs/serving.md)"),
    pytest.mark.slow,
]
NEW, TIE = 12, 1e-3
SHAPE = {"hidden_size": 128, "intermediate_size": 256}  # vLLM's attention takes heads of 32 channels and more
WITH_OWN_4_BITS = {"VLLM_DISABLED_KERNELS": "CPUWNA16LinearKernel"}


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(3, 20, (20,), generator=generator).tolist()
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def vllm(
    place: Path, model: Path, environment: dict[str, str] | None = None, **engine: Any
) -> subprocess.CompletedProcess[str]:
    """vLLM's process; its answers are in ``place / "answered.json"``."""
    arguments = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128} | engine
    (place / "asked.json").write_text(json.dumps({"prompts": prompts(), "new": NEW, "engine": arguments}))
    side = Path(__file__).with_name("vllm_side.py")
    command = [PYTHON, str(side), str(model), str(place / "asked.json"), str(place / "answered.json")]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | (environment or {}))


@torch.no_grad()
def assert_the_same_tokens(place: Path, reference: Path) -> None:
    """What vLLM answered is greedy for lowbit's model too, up to the first tie."""
    model = lowbit.load(reference, dtype=torch.float32)
    answers = json.loads((place / "answered.json").read_text())
    assert len(answers) == 20
    for prompt, answer in zip(prompts(), answers, strict=True):
        logits = model(torch.tensor([prompt + answer["ids"]])).logits[0, len(prompt) - 1 : -1]
        for at, token in enumerate(answer["ids"]):
            behind = (logits[at].max() - logits[at, token]).item()
            assert behind < TIE, f"token {at} of {answer['ids']} is {behind} behind"
            if behind > 0:
                break


@pytest.mark.parametrize(
    ("options", "engine"),
    [
        ({"bits": 4, "group_size": 32}, {}),
        ({"bits": 2, "group_size": 16}, {}),
        ({"bits": 3, "group_size": 32}, {"tensor_parallel_size": 2}),
    ],
    ids=str,
)
def test_native_checkpoints_give_the_same_tokens(tmp_path, options, engine):
    tiny_llama(tmp_path / "model", **SHAPE, tie_word_embeddings=False)
    lowbit.quantize(tmp_path / "model", lowbit.recipe("rtn", **options), None, out=tmp_path / "q", max_kl=50)
    done = vllm(tmp_path, tmp_path / "q", {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if engine else {}, **engine)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_the_same_tokens(tmp_path, tmp_path / "q")


@pytest.mark.parametrize(("bits", "environment"), [(2, {}), (3, {}), (4, WITH_OWN_4_BITS), (5, {}), (8, {})])
def test_compressed_tensors_of_every_width_give_the_same_tokens(tmp_path, bits, environment):
    tiny_llama(tmp_path / "model", **SHAPE, tie_word_embeddings=False)
    recipe = lowbit.recipe("rtn", bits=bits, group_size=32, symmetric=bits == 5)
    lowbit.quantize(tmp_path / "model", recipe, None, out=tmp_path / "q", max_kl=50)
    lowbit.export(tmp_path / "q", "compressed-tensors", out=tmp_path / "out")
    done = vllm(tmp_path, tmp_path / "out", environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_the_same_tokens(tmp_path, tmp_path / "q")


def test_a_checkpoint_with_a_packed_cache_is_refused_with_the_reason(tmp_path):
    tiny_llama(tmp_path / "model", **SHAPE)
    recipe = lowbit.recipe("kivi", bits=4, group_size=32)
    lowbit.quantize(tmp_path / "model", recipe, None, out=tmp_path / "q", max_kl=50)
    done = vllm(tmp_path, tmp_path / "q")
    assert done.returncode != 0 and "its cache of keys and values is packed" in done.stderr
