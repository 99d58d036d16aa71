"""Tokens a second in vLLM on a CPU, this project's kernels beside vLLM's own; or, with --text, what vLLM computes beside lowbit.

    python benchmarks/vllm.py --python VENV/bin/python --cores 0,1 -o speed.jsonl \\
        bf16=MODEL ct-w4=EXPORTED own-w4=EXPORTED:own w4=NATIVE w2=NATIVE
    python benchmarks/vllm.py --python VENV/bin/python --text TEXT --dtype float32 -o agreement.jsonl w4=NATIVE w3=EXPORTED

    python benchmarks/vllm.py --make DIR

--make writes random models of the layers of Llama-3.2-1B, eight blocks, in DIR: model (bfloat16), w4, w3, w2 (native, groups of 64 and 32)
and w4-ct (compressed-tensors), for speed alone. In a model as small as SmolLM2-135M most time is vLLM's own.

VENV has vLLM and, without its dependencies, lowbit. A directory followed by ``:own`` is a compressed-tensors checkpoint whose 4-bit
products go to this project's kernels (``VLLM_DISABLED_KERNELS=CPUWNA16LinearKernel``). Each model runs in a process of its own
(vllm_child.py). For speed, models run in turns, ``--rounds`` times, and the best round counts, because whatever else runs on a
machine only slows one down; tokens a second of the processor hold on a busy machine too, where --cores names one core. Figures of one
run compare with each other only.

With --text: greedy tokens of 20 prompts and the perplexity of windows of the text, in vLLM and here. A greedy token of vLLM's that is
not ours is told by how far its logit is behind ours; tokens after the first such one have another context and are not compared.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CHILD = Path(__file__).with_name("vllm_child.py")
PROMPTS, PROMPT = 20, 16
UNITS = ("second", "processor_second")
SHAPE = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 64, "vocab_size": 8192, "tie_word_embeddings": False, "max_position_embeddings": 2048,
}  # fmt: skip
AS_IT_IS = [{"match": part, "bits": 16} for part in ("embedding", "head")]
OWN = "CPUWNA16LinearKernel"


def answered(arguments: argparse.Namespace, model: str, **wanted: Any) -> dict[str, Any]:
    """What vllm_child.py finds of ``DIR[:own]``.

    Raises:
        RuntimeError: vLLM failed; the end of what it printed.
    """
    directory, _, own = model.partition(":")
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": arguments.cores,
        "VLLM_DISABLED_KERNELS": OWN if own else "",
    }
    engine = {"dtype": arguments.dtype, "enforce_eager": True, "max_model_len": arguments.context} | wanted.pop(
        "engine", {}
    )
    with tempfile.TemporaryDirectory() as place:
        asked, out = Path(place) / "asked", Path(place) / "answered"
        asked.write_text(json.dumps({"engine": engine} | wanted))
        command = [arguments.python, "-P", str(CHILD), directory, str(asked), str(out)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if not out.is_file():
            raise RuntimeError(f"{model}: {(done.stdout + done.stderr)[-3000:]}")
        return json.loads(out.read_text())


def speeds(arguments: argparse.Namespace, models: dict[str, str]) -> list[dict[str, Any]]:
    """The best round of each model."""
    best: dict[str, dict[str, list[float]]] = {name: {} for name in models}
    asked = {"streams": arguments.streams, "prompt": arguments.prompt, "new": arguments.new}
    for turn in range(arguments.rounds):
        for name, model in models.items():
            engine = {"max_num_seqs": max(arguments.streams)}
            found = answered(arguments, model, engine=engine, speed=asked)["speed"]
            for what, pair in found.items():
                best[name][what] = [max(each) for each in zip(pair, best[name].get(what, pair), strict=True)]
            told = ", ".join(f"{what}: {pair[0]:.1f} ({pair[1]:.1f})" for what, pair in found.items())
            print(f"round {turn + 1}: {name}: {told} tokens/s on the clock (of the processor)", file=sys.stderr)
    how = {"dtype": arguments.dtype, "cores": arguments.cores}
    return [
        {"model": name, **how, **{f"tokens_per_{unit}": _column(found, i) for i, unit in enumerate(UNITS)}}
        for name, found in best.items()
    ]


def _column(found: dict[str, list[float]], i: int) -> dict[str, float]:
    return {what: round(pair[i], 2) for what, pair in found.items()}


def agreement(arguments: argparse.Namespace, models: dict[str, str]) -> list[dict[str, Any]]:
    """What vLLM and lowbit make of the same prompts and windows."""
    import torch

    from lowbit import load, load_tokenizer
    from lowbit.data import tokenize, windows
    from lowbit.texts import load_text

    rows = []
    for name, model in models.items():
        directory = model.partition(":")[0]
        ids = tokenize(load_text(str(arguments.text), "evaluation").text, load_tokenizer(directory))
        cut = windows(ids, arguments.context - 1, arguments.windows)
        prompts = [row[:PROMPT].tolist() for row in windows(ids, 10 * PROMPT, PROMPTS)]
        greedy = {"prompts": prompts, "new": arguments.new}
        found = answered(arguments, model, greedy=greedy, windows=cut.tolist())
        reference = load(directory, dtype=torch.float32)
        behind = [_behind(reference, prompt, answer) for prompt, answer in zip(prompts, found["greedy"], strict=True)]
        ours = _loss(reference, cut)
        row = {
            "model": name,
            "dtype": arguments.dtype,
            "equal": sum(each == 0 for each in behind),
            "prompts": len(behind),
            "first_differences": [each for each in behind if each],
            "perplexity": math.exp(found["loss"]),
            "perplexity_here": math.exp(ours),
            "relative": math.expm1(found["loss"] - ours),
        }
        print(json.dumps(row), file=sys.stderr)
        rows.append(row)
    return rows


def make(place: Path) -> None:
    """Random models in ``place``, each of the same weights; see the module."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lowbit import export, quantize, recipe

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE)
    LlamaForCausalLM(config).bfloat16().save_pretrained(place / "model")
    for bits, size in ((4, 64), (3, 64), (2, 32)):
        made = recipe("rtn", bits=bits, group_size=size, symmetric=True).with_overrides(AS_IT_IS)
        quantize(place / "model", made, None, out=place / f"w{bits}", allow_broken=True)
    export(place / "w4", "compressed-tensors", out=place / "w4-ct")


def _behind(model: Any, prompt: list[int], answer: list[int]) -> float:
    """By how much the logit of the first token that is not greedy here is behind; 0: all are."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
    chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    return next((each for each in (logits.amax(1) - chosen).tolist() if each > 0), 0.0)


def _loss(model: Any, windows_NT: Any) -> float:
    """Mean loss of each next token, in nats, float32 logits."""
    import torch
    from torch.nn.functional import cross_entropy

    with torch.no_grad():
        losses = [cross_entropy(model(ids[None]).logits[0, :-1].float(), ids[1:]).item() for ids in windows_NT]
    return sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="NAME=DIR[:own]")
    parser.add_argument("--python", help="an interpreter with vLLM and lowbit")
    parser.add_argument("--cores", default="0", help="as VLLM_CPU_OMP_THREADS_BIND has them, such as 0-1")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--new", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--context", type=int, default=513, help="of the engine: one more than the tokens of a window")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8], help="sequences at once")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt whose reading is timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--text", type=Path, help="compare what vLLM and lowbit compute, instead of speed")
    parser.add_argument("--windows", type=int, default=8, help="of --text")
    parser.add_argument("-o", "--out", type=Path, help="a line of JSON for each model")
    parser.add_argument("--make", type=Path, metavar="DIR", help="write random models to measure, and nothing else")
    arguments = parser.parse_args()
    if arguments.make is not None:
        make(arguments.make)
        return
    if not (arguments.models and arguments.python and arguments.out):
        parser.error("models, --python and -o are needed")
    models = dict(each.split("=", 1) for each in arguments.models)
    rows = (agreement if arguments.text else speeds)(arguments, models)
    arguments.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
