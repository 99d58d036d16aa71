"""Whether llama.cpp's rounding of inputs to 8 bits is what its logits differ by from those computed here.

    python benchmarks/llama_cpp_inputs.py f16/model.gguf q8_0/model.gguf q4_k_m/model.gguf --text test.txt -o results.json

Of every file the same windows run in llama.cpp (one thread), here on the same decoded weights, and here once more with the input of
each packed product rounded as llama.cpp's kernels round it: for types of 256 elements to Q8_K (blocks of 256, a float32 scale), for
those of 32 to Q8_0 (blocks of 32, a float16 scale; Q4_1 and Q5_1 to Q8_1, which rounds alike). If the rounding explains the difference,
the third is as close to llama.cpp as the second is for a file in F16, whose inputs are not rounded to 8 bits.

Needs xllamacpp (``pip install --no-deps xllamacpp``).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from llama_cpp_library import LlamaCpp, token_windows, write_rows
from torch import Tensor

import lowbit
from lowbit.layouts.ggml import BLOCK_TYPES
from lowbit.modules import QuantLinear

_LONG = {kind.spec for kind in BLOCK_TYPES.values() if kind.elements == 256}


def rounded(x: Tensor, block: int) -> Tensor:
    """``x`` ``[..., I]`` as llama.cpp's products read it: 8 bits in blocks of 32 or 256."""
    x_NB = x.float().reshape(-1, block)
    extreme = x_NB.gather(1, x_NB.abs().argmax(1, keepdim=True))
    if block == 256:  # the extreme becomes -127, whatever its sign
        scale = extreme / -127
        codes = (x_NB / torch.where(scale == 0, 1, scale)).round().clamp(-128, 127)
    else:
        scale = extreme.abs() / 127
        codes = (x_NB / torch.where(scale == 0, 1, scale)).round()
        scale = scale.half().float()
    return (codes * scale).view(x.shape).to(x.dtype)


def round_inputs(model: Any) -> list[Any]:
    """Hooks that round the input of every packed product."""

    def hook(module: QuantLinear, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (rounded(inputs[0], 256 if module.spec in _LONG else 32), *inputs[1:])

    return [m.register_forward_pre_hook(hook) for m in model.modules() if isinstance(m, QuantLinear)]


def compared(p: list[Tensor], q: list[Tensor]) -> dict[str, float]:
    """Mean KL divergence, and the root mean square and largest difference of the log probability of p's most likely token."""
    kl = torch.cat([(a.exp() * (a - b)).sum(-1) for a, b in zip(p, q, strict=True)])
    gaps = torch.cat([(a - b).gather(1, a.argmax(1, keepdim=True))[:, 0] for a, b in zip(p, q, strict=True)])
    return {"kl": kl.mean().item(), "rms": gaps.square().mean().sqrt().item(), "largest": gaps.abs().max().item()}


def perplexity(rows: list[Tensor], windows: Tensor) -> float:
    pairs = zip(rows, windows, strict=True)
    lost = torch.cat([-r[:-1].gather(1, ids[1:, None]).double() for r, ids in pairs])
    return lost.mean().exp().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("-o", "--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for file in arguments.files:
        tokenizer: Any = lowbit.load_tokenizer(file.parent)
        ids = token_windows(tokenizer, arguments.text, "evaluation", arguments.windows, arguments.tokens)
        engine = LlamaCpp(file)
        theirs = [engine.log_probabilities(window.tolist()) for window in ids]
        engine.close()
        model = lowbit.load(file.parent, dtype=torch.float32)

        def here(model: Any = model, ids: Tensor = ids) -> list[Tensor]:
            with torch.no_grad():
                return [model(window[None]).logits[0].log_softmax(-1) for window in ids]

        exact = here()
        row: dict[str, Any] = {
            "file": file.parent.name,
            "perplexity in llama.cpp": perplexity(theirs, ids),
            "perplexity here": perplexity(exact, ids),
            "llama.cpp against here": compared(exact, theirs),
        }
        if round_inputs(model):
            same = here()
            row |= {
                "perplexity here, inputs rounded": perplexity(same, ids),
                "llama.cpp against here, inputs rounded": compared(same, theirs),
                "here, inputs rounded, against here": compared(exact, same),
            }
        rows.append(row)
        print(json.dumps(row), flush=True)
    write_rows(arguments.out, rows, windows=arguments.windows, tokens=arguments.tokens)


if __name__ == "__main__":
    main()
