"""What llama.cpp loses with the codes of lowbit and with those of its own encoder: KL divergence from full precision, through llama.cpp.

    lowbit export smollm2-135m --format gguf:f16 -o f16
    lowbit quantize smollm2-135m --method gptq --format gguf:q4_k_m --calibration valid.txt -o ours
    python benchmarks/gguf_encoders.py smollm2-135m f16/model.gguf ours/model.gguf --calibration valid.txt --text test.txt -o results.json

Needs xllamacpp (``pip install --no-deps xllamacpp``). The rival of a file has the same types for the same tensors, so the same bytes: its
data come from llama.cpp's own encoder (``ggml_quantize_chunk``) for the weights of the file in full precision, with the importance that
``llama-imatrix`` takes: the mean square of each input on the calibration text. Tensors that are looked up (embeddings) have none.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from llama_cpp_library import LlamaCpp, encoded, token_windows, write_rows
from torch import Tensor

import lowbit
from lowbit.architectures.gguf import gguf_architecture
from lowbit.checkpoints.formats.gguf_names import GgufNames


def importance(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """The mean square of each input of every linear, by name of the module; ids ``[windows, tokens]``."""
    sums: dict[str, Tensor] = {}

    def listen(name: str):
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            sums[name] = sums.get(name, 0) + inputs[0].float().square().flatten(0, -2).sum(0)

        return hook

    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    hooks = [module.register_forward_pre_hook(listen(name)) for name, module in linears]
    with torch.no_grad():
        for window in ids:
            model(window[None])
    for hook in hooks:
        hook.remove()
    return {name: total / ids.numel() for name, total in sums.items()}


def write_rival(ours: Path, full: Path, weights: dict[str, Tensor], file: Path) -> None:
    """``file``: ``ours`` with the data of ``full``, packed by llama.cpp's encoder; ``weights``: importance by GGUF's names."""
    shutil.copyfile(ours, file)
    originals = {tensor.name: tensor for tensor in gguf.GGUFReader(full).tensors}
    for tensor in gguf.GGUFReader(file, "r+").tensors:
        original = originals[tensor.name]
        if tensor.tensor_type == original.tensor_type:  # norms, which a training may have moved
            tensor.data[:] = original.data
            continue
        w = torch.from_numpy(np.array(gguf.dequantize(original.data, original.tensor_type), dtype=np.float32))
        data = encoded(w, tensor.tensor_type, weights.get(tensor.name))
        tensor.data[:] = data.reshape(tensor.data.shape)


def divergence(file: Path, windows: Tensor, wanted: list[Tensor]) -> tuple[float, float]:
    """Mean KL divergence in nats, and the share of tokens with the same most likely next one."""
    engine, kl, same = LlamaCpp(file), [], []
    for ids, p in zip(windows, wanted, strict=True):
        q = engine.log_probabilities(ids.tolist())
        kl.append((p.float().exp() * (p.float() - q)).sum(-1))
        same.append((p.argmax(-1) == q.argmax(-1)).float())
    engine.close()
    return torch.cat(kl).mean().item(), torch.cat(same).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="in full precision")
    parser.add_argument("full", type=Path, help="the same as a .gguf file")
    parser.add_argument("ours", type=Path, nargs="+")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--samples", type=int, default=16, help="windows of 512 tokens for the importance")
    parser.add_argument("-o", "--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer: Any = lowbit.load_tokenizer(arguments.model)

    model = lowbit.load(arguments.model, dtype=torch.float32)
    names = GgufNames(gguf_architecture(model.config), model.config)
    found = importance(model, token_windows(tokenizer, arguments.calibration, "calibration", arguments.samples, 512))
    weights = {stored: w for name, w in found.items() if (stored := names.find(f"{name}.weight"))}
    del model
    print(f"importance of {len(weights)} tensors", flush=True)
    held_out = token_windows(tokenizer, arguments.text, "evaluation", arguments.windows, arguments.tokens)
    engine = LlamaCpp(arguments.full)
    wanted = [engine.log_probabilities(ids.tolist()).half() for ids in held_out]
    engine.close()
    rows = []
    for ours in arguments.ours:
        with tempfile.TemporaryDirectory() as place:
            rival = Path(place) / "rival.gguf"
            write_rival(ours, arguments.full, weights, rival)
            assert rival.stat().st_size == ours.stat().st_size
            row = {"file": ours.parent.name, "bytes": ours.stat().st_size}
            for who, file in (("lowbit", ours), ("llama.cpp", rival)):
                kl, same = divergence(file, held_out, wanted)
                row |= {f"{who} kl": kl, f"{who} same": same}
        row["ratio"] = row["lowbit kl"] / row["llama.cpp kl"]
        rows.append(row)
        print(json.dumps(row), flush=True)
    write_rows(arguments.out, rows, windows=arguments.windows, tokens=arguments.tokens)


if __name__ == "__main__":
    main()
