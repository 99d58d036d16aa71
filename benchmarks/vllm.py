"""Tokens a second in vLLM on a CPU: this project's kernels beside vLLM's own, each model in a process of its own.

    python benchmarks/vllm.py --python VENV/bin/python --cores 0,1 -o results.jsonl \\
        bf16=MODEL ct-w4=EXPORTED own-w4=EXPORTED:own w4=NATIVE w2=NATIVE

VENV has vLLM and, without its dependencies, lowbit. A directory followed by ``:own`` is a compressed-tensors checkpoint whose 4-bit
products go to this project's kernels (``VLLM_DISABLED_KERNELS=CPUWNA16LinearKernel``). Models run in turns, ``--rounds`` times, and
the best round counts, because whatever else runs on a machine only slows one down. Figures of one run compare with each other only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CHILD = """
import json, sys, time
from vllm import LLM, SamplingParams
model, streams, new, dtype = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
engine = LLM(model, skip_tokenizer_init=True, dtype=dtype, enforce_eager=True, max_model_len=512, max_num_seqs=max(1, streams))
def run(tokens):
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": [1 + (7 * i + j) % 90 for j in range(16)]} for i in range(streams)]
    began = time.perf_counter()
    engine.generate(prompts, sampling, use_tqdm=False)
    return time.perf_counter() - began
run(4)
first, whole = run(1), run(new + 1)
open(sys.argv[5], "w").write(json.dumps(streams * new / (whole - first)))
"""


def measured(python: str, model: str, streams: int, new: int, dtype: str, cores: str) -> float:
    """Tokens a second after the first, of ``streams`` sequences at once.

    Raises:
        RuntimeError: vLLM failed; the end of what it printed.
    """
    directory, _, own = model.partition(":")
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_DISABLED_KERNELS": "CPUWNA16LinearKernel" if own else "",
    }
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "out"
        asked = [python, "-c", CHILD, directory, str(streams), str(new), dtype, str(out)]
        done = subprocess.run(asked, env=environment, capture_output=True, text=True)
        if not out.is_file():
            raise RuntimeError(f"{model}: {done.stderr[-2000:]}")
        return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=DIR[:own]")
    parser.add_argument("--python", required=True, help="an interpreter with vLLM and lowbit")
    parser.add_argument("--cores", default="0", help="as VLLM_CPU_OMP_THREADS_BIND has them, such as 0-1")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8], help="sequences at once")
    parser.add_argument("--new", type=int, default=64, help="tokens of each")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "-o", "--out", type=Path, required=True, help="a line of JSON for each model and number of streams"
    )
    asked = parser.parse_args()
    models = dict(each.split("=", 1) for each in asked.models)
    best: dict[tuple[str, int], float] = {}
    whole = asked.rounds * len(asked.streams) * len(models)
    for turn in range(whole):
        number, name = divmod(turn, len(models))
        name, streams = [*models][name], asked.streams[number % len(asked.streams)]
        speed = measured(asked.python, models[name], streams, asked.new, asked.dtype, asked.cores)
        best[name, streams] = max(best.get((name, streams), 0.0), speed)
        print(f"{turn + 1} of {whole}: {name}, {streams} at once: {speed:.1f} tokens/s", file=sys.stderr)
    with asked.out.open("w") as stream:
        for (name, streams), speed in best.items():
            row = {
                "model": name,
                "streams": streams,
                "tokens_per_second": round(speed, 2),
                "dtype": asked.dtype,
                "cores": asked.cores,
            }
            stream.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
