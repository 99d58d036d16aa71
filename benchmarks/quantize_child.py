"""One quantization in a process of its own, for quantize.py: seconds, processor time, peak memory and perplexity, as JSON.

    PYTHON benchmarks/quantize_child.py TOOL MODEL IDS.safetensors OUT [--options JSON]

TOOL is lowbit, llm-compressor, auto-round or gptqmodel, and PYTHON an interpreter that has it. IDS holds ``calibration`` and ``evaluation``
windows, so that every tool sees the same tokens. Only quantizing and saving are timed; imports, loading and perplexity are not.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy


def lowbit(model: str, ids: Tensor, out: Path, options: dict[str, Any]) -> tuple[Callable[[], None], Callable[[], Any]]:
    """``options``: of the recipe, with its name as ``method``, or a file as ``recipe``; and a file format as ``format``."""
    import lowbit
    from lowbit.recipes import recipe

    name = options.pop("format", "native")
    made = options["recipe"] if "recipe" in options else recipe(options.pop("method"), **options)
    return lambda: lowbit.quantize(model, made, ids, out=out, format=name) and None, lambda: lowbit.load(
        out, torch.float32
    )


def llm_compressor(
    model: str, ids: Tensor, out: Path, options: dict[str, Any]
) -> tuple[Callable[[], None], Callable[[], Any]]:
    """``options``: bits, group_size, symmetric, dtype."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, options["dtype"]))
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    weights = QuantizationArgs(
        num_bits=options["bits"],
        type="int",
        symmetric=options["symmetric"],
        strategy="group",
        group_size=options["group_size"],
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    modifier = GPTQModifier(config_groups=groups, ignore=["lm_head"])

    def quantize() -> None:
        oneshot(
            model=loaded,
            tokenizer=AutoTokenizer.from_pretrained(model),
            dataset=rows,
            recipe=modifier,
            max_seq_length=ids.shape[1],
            num_calibration_samples=len(ids),
            output_dir=str(out),
        )

    return quantize, lambda: loaded.float()


def auto_round(
    model: str, ids: Tensor, out: Path, options: dict[str, Any]
) -> tuple[Callable[[], None], Callable[[], Any]]:
    """``options``: bits, group_size, symmetric, steps, batch, dtype."""
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, options["dtype"]))
    rounding = AutoRound(
        loaded,
        AutoTokenizer.from_pretrained(model),
        bits=options["bits"],
        group_size=options["group_size"],
        sym=options["symmetric"],
        iters=options["steps"],
        batch_size=options["batch"],
        nsamples=len(ids),
        seqlen=ids.shape[1],
        dataset=[{"input_ids": row[None]} for row in ids],
    )

    def quantize() -> None:
        rounding.quantize()
        rounding.save_quantized(str(out), format="fake")

    return quantize, lambda: rounding.model.float()


def gptqmodel(
    model: str, ids: Tensor, out: Path, options: dict[str, Any]
) -> tuple[Callable[[], None], Callable[[], Any]]:
    """``options``: bits, group_size, symmetric, dtype."""
    # It asks for two workers, and fails where half of the processors are fewer.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    dtype = getattr(torch, options["dtype"])
    config = QuantizeConfig(
        bits=options["bits"], group_size=options["group_size"], sym=options["symmetric"], desc_act=False
    )
    made = GPTQModel.load(model, config, device="cpu", dtype=dtype)

    def quantize() -> None:
        made.quantize([{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids])
        made.save(str(out))

    return quantize, lambda: GPTQModel.load(str(out), device="cpu", dtype=dtype, backend=BACKEND.TORCH).model


TOOLS = {"lowbit": lowbit, "llm-compressor": llm_compressor, "auto-round": auto_round, "gptqmodel": gptqmodel}
MODULES = {"lowbit": "lowbit", "llm-compressor": "llmcompressor", "auto-round": "auto_round", "gptqmodel": "gptqmodel"}


def peak_bytes() -> int:
    """The largest resident set of this process. What getrusage says is at least that of the process that started this one."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status does not say the largest resident set: run this on Linux")


@torch.no_grad()
def perplexity(model: Any, ids_NT: Tensor) -> float:
    """exp of the mean next-token loss; no token is context for two windows."""
    losses = [cross_entropy(model(input_ids=ids[None]).logits[0, :-1].float(), ids[1:]).item() for ids in ids_NT]
    return torch.tensor(losses).mean().exp().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("model")
    parser.add_argument("ids", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--options", type=json.loads, default={})
    arguments = parser.parse_args()
    torch.manual_seed(0)
    ids = load_file(arguments.ids)
    quantize, result = TOOLS[arguments.tool](arguments.model, ids["calibration"], arguments.out, arguments.options)
    start, used = time.perf_counter(), time.process_time()
    quantize()
    measured: dict[str, Any] = {
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time() - used,
        "peak_bytes": peak_bytes(),
        "version": import_module(MODULES[arguments.tool]).__version__,
    }
    measured["perplexity"] = perplexity(result(), ids["evaluation"])
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
