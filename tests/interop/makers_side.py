"""A whole model quantized by another project's tool: ``python makers_side.py MAKER MODEL IDS.safetensors OUT``, by an interpreter that has it.

MAKER is ``TOOL:KIND``, see :data:`MAKERS`. IDS holds ``calibration`` and ``evaluation`` windows. OUT/model is the checkpoint as the tool
saves it, and OUT/read.safetensors what the tool's own reader makes of it: ``weight.NAME`` of each linear, decoded, and ``logits`` of the
evaluation windows.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def llm_compressor(kind: str, model: str, calibration: Tensor, out: str) -> tuple[Any, dict[str, Tensor]]:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    rows = Dataset.from_dict(
        {"input_ids": calibration.tolist(), "attention_mask": torch.ones_like(calibration).tolist()}
    )
    if kind == "awq":
        from llmcompressor.modifiers.transform.awq import AWQModifier

        if not torch.accelerator.is_available():  # llm-compressor 0.14 pins memory all the same, which torch refuses
            torch.Tensor.pin_memory = lambda self, *_: self  # pyright: ignore[reportAttributeAccessIssue]
        weights = QuantizationArgs(num_bits=4, symmetric=False, strategy="group", group_size=64)
        groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
        recipe: Any = [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=["lm_head"])]
    elif kind == "fp8":
        recipe = QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"])
    else:
        bits, symmetric = int(kind[1]), kind.endswith("sym")
        weights = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=64)
        groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
        recipe = GPTQModifier(config_groups=groups, ignore=["lm_head"])
    oneshot(
        model=loaded,
        tokenizer=AutoTokenizer.from_pretrained(model),
        dataset=rows,
        recipe=recipe,
        max_seq_length=calibration.shape[1],
        num_calibration_samples=len(calibration),
        output_dir=out,
    )
    decoded = CompressedTensorsConfig(dequantize=True)
    read = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, quantization_config=decoded)
    linears = {n: m.weight for n, m in read.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    return read, linears


def gptqmodel(kind: str, model: str, calibration: Tensor, out: str) -> tuple[Any, dict[str, Tensor]]:
    os.environ.setdefault(
        "GPTQMODEL_CPU_WORKERS", "2"
    )  # it asks for two, and fails where half of the processors are fewer
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    bits, *rest = kind.removeprefix("w").split("-")
    options: dict[str, Any] = {"bits": int(bits), "group_size": 64}
    if "awq" in rest:
        options |= {"method": "awq", "format": "gemm"}
    else:
        options |= {"desc_act": "act" in rest, "sym": "asym" not in rest}
    made = GPTQModel.load(model, QuantizeConfig(**options), device="cpu", dtype=torch.float16)
    made.quantize([{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in calibration])
    made.save(out)
    backend = BACKEND.TORCH_AWQ if "awq" in rest else BACKEND.TORCH
    read = GPTQModel.load(out, device="cpu", dtype=torch.float16, backend=backend)
    linears = {n: m.dequantize_weight().T for n, m in read.model.named_modules() if hasattr(m, "dequantize_weight")}
    return read.model, linears


MAKERS = {"llm-compressor": llm_compressor, "gptqmodel": gptqmodel}
"""The tools, each a function of a kind, a model, calibration windows and where to save: its reader's model, and decoded weights."""


@torch.no_grad()
def main(maker: str, model: str, ids: str, out: str) -> None:
    tool, kind = maker.split(":")
    windows = load_file(ids)
    with torch.enable_grad():
        read, linears = MAKERS[tool](kind, model, windows["calibration"], f"{out}/model")
    found = {f"weight.{name}": weight.contiguous() for name, weight in linears.items()}
    logits = torch.cat([read(input_ids=row[None]).logits.float() for row in windows["evaluation"]])
    save_file(found | {"logits": logits}, Path(out) / "read.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
