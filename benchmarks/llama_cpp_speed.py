"""Tokens per second of llama.cpp, one token at a time, in a process of its own: the counterpart of decode.py.

    python benchmarks/llama_cpp_speed.py MODEL.gguf [--threads 2]
    python benchmarks/llama_cpp_speed.py MODEL.gguf --quantize Q4_0 -o model-q4.gguf [--keep-embedding]

Needs llama-cpp-python (``pip install llama-cpp-python``, which compiles llama.cpp for this processor). Prints JSON. A
GGUF that is quantized already is quantized again from what it holds: of interest for its speed only.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

import llama_cpp

PROMPT, NEW = 16, 16
_BF16 = 30  # of ggml_type, which the package gives no name to


def quantized(source: Path, kind: str, target: Path, keep_embedding: bool) -> None:
    """Writes ``source`` with its linears as ``kind``; the embedding, which is the head too, as BF16 or as llama.cpp has it."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    parameters.allow_requantize = True
    if keep_embedding:
        parameters.token_embedding_type = parameters.output_tensor_type = _BF16
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), parameters)
    if failed:
        raise SystemExit(f"llama.cpp could not quantize {source} as {kind} (code {failed})")


def speed(file: Path, threads: int, repeats: int) -> float:
    """The best of some runs: greedy steps behind a short prompt."""
    model = llama_cpp.Llama(str(file), n_ctx=256, n_threads=threads, n_threads_batch=threads, verbose=False)
    found = []
    for _ in range(repeats + 1):  # the first warms up
        model.reset()
        model.eval(list(range(PROMPT)))
        start = time.perf_counter()
        for _ in range(NEW):
            model.eval([model.sample(temp=0.0)])
        found.append(NEW / (time.perf_counter() - start))
    return max(found[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quantize", help="a file type of llama.cpp, such as Q4_0; writes -o instead of measuring")
    parser.add_argument("--keep-embedding", action="store_true", help="with --quantize: embedding and head in BF16")
    parser.add_argument("-o", type=Path, help="with --quantize: the file to write")
    arguments = parser.parse_args()
    if arguments.quantize:
        quantized(arguments.model, arguments.quantize, arguments.o, arguments.keep_embedding)
        return
    found = speed(arguments.model, arguments.threads, arguments.repeats)
    print(json.dumps({"tokens_per_s": found, "llama_cpp_python": version("llama-cpp-python")}))


if __name__ == "__main__":
    main()
