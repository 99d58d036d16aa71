"""Milliseconds a token of llama.cpp behind long texts, by the type of its cache: the counterpart of kv_cache.py.

    lowbit export smollm2-135m --format gguf:f16 -o smollm2-f16
    python benchmarks/llama_cpp.py smollm2-f16/model.gguf [--contexts 1024 8000] [--types f16 q8_0 q4_0] [--threads 2]

Needs xllamacpp (``pip install --no-deps xllamacpp``), which brings llama.cpp compiled. Keys and values have one type, flash attention
is on, one sequence. A context is random token ids; its first request fills the cache, those that follow are timed and go on
behind the same ids. The median of them is printed, as a table and as JSON.
"""

from __future__ import annotations

import argparse
import json
import random
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import xllamacpp

NEW, REPEATS = 32, 5
FIRST = 1000  # token ids from here on are words in the vocabularies that this is run with


def server(file: Path, context: int, kind: str, threads: int) -> Any:
    """A server for one sequence of ``context`` tokens and those that follow."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = context + NEW + 32, 1, 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.verbosity, parameters.warmup = -1, True
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    cache = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{kind.upper()}")
    parameters.cache_type_k = parameters.cache_type_v = cache
    return xllamacpp.Server(parameters)


def milliseconds(file: Path, context: int, kind: str, threads: int) -> float:
    """The median time of a token behind ``context`` tokens."""
    engine = server(file, context, kind, threads)
    prompt = random.Random(0).choices(range(FIRST, FIRST + 4000), k=context)
    asked = {"prompt": prompt, "n_predict": NEW, "temperature": 0, "ignore_eos": True, "cache_prompt": True}
    found = []
    for _ in range(REPEATS + 1):  # the first fills the cache
        times = engine.handle_completions(asked)["timings"]
        assert times["predicted_n"] == NEW, times
        found.append(times["predicted_per_token_ms"])
    return median(found[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8000])
    parser.add_argument("--types", nargs="+", default=["f16", "q8_0", "q4_0"])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    rows = []
    print("cache of keys and values | " + " | ".join(f"ms a token behind {n:,}" for n in arguments.contexts))
    for kind in arguments.types:
        found = [milliseconds(arguments.model, n, kind, arguments.threads) for n in arguments.contexts]
        rows.append({"type": kind, "ms": dict(zip(map(str, arguments.contexts), found, strict=True))})
        print(f"{kind} | " + " | ".join(f"{each:.2f}" for each in found), flush=True)
    print(json.dumps({"xllamacpp": version("xllamacpp"), "threads": arguments.threads, "rows": rows}))


if __name__ == "__main__":
    main()
