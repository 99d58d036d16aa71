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
import ctypes
import json
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import xllamacpp
from torch import Tensor

import lowbit
from lowbit.architectures.gguf import gguf_architecture
from lowbit.checkpoints.formats.gguf_names import GgufNames
from lowbit.texts import load_text

LIBRARY = ctypes.CDLL(next(str(file) for file in Path(xllamacpp.__file__).parent.glob("*.so")))


class _Struct(ctypes.Structure):
    """A structure of llama.cpp's that is only passed on: as large as any of them."""

    _fields_ = [("bytes", ctypes.c_byte * 1024)]


class _Batch(ctypes.Structure):
    """``llama_batch``, with room for fields that later versions add."""

    _fields_ = [
        ("count", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("seqs", ctypes.POINTER(ctypes.c_int32)),
        ("seq", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
        ("more", ctypes.c_byte * 64),
    ]


def _function(name: str, returns: Any, *takes: Any) -> Any:
    function = getattr(LIBRARY, name)
    function.restype, function.argtypes = returns, takes
    return function


class LlamaCpp:
    """A file in llama.cpp on one thread: log probabilities of every token of windows of up to 512."""

    def __init__(self, file: Path):
        pointer = ctypes.c_void_p
        _function("llama_backend_init", None)()
        defaults = _function("llama_model_default_params", _Struct)()
        load = _function("llama_model_load_from_file", pointer, ctypes.c_char_p, _Struct)
        self._model = load(str(file).encode(), defaults)
        context = _function("llama_init_from_model", pointer, pointer, _Struct)
        self._context = context(self._model, _function("llama_context_default_params", _Struct)())
        _function("llama_set_n_threads", None, pointer, ctypes.c_int32, ctypes.c_int32)(self._context, 1, 1)
        vocabulary = _function("llama_model_get_vocab", pointer, pointer)(self._model)
        self.words = _function("llama_vocab_n_tokens", ctypes.c_int32, pointer)(vocabulary)

    def log_probabilities(self, ids: list[int]) -> Tensor:
        """``[tokens, vocabulary]``."""
        memory = _function("llama_get_memory", ctypes.c_void_p, ctypes.c_void_p)(self._context)
        _function("llama_memory_clear", None, ctypes.c_void_p, ctypes.c_bool)(memory, True)
        make = _function("llama_batch_init", _Batch, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32)
        batch = make(len(ids), 0, 1)
        batch.count = len(ids)
        for i, each in enumerate(ids):
            batch.token[i], batch.pos[i], batch.seqs[i], batch.logits[i] = each, i, 1, 1
            batch.seq[i][0] = 0
        decode = _function("llama_decode", ctypes.c_int32, ctypes.c_void_p, _Batch)
        if decode(self._context, batch) != 0:
            raise RuntimeError("llama.cpp could not decode a window")
        logits = _function("llama_get_logits", ctypes.POINTER(ctypes.c_float), ctypes.c_void_p)(self._context)
        found = np.ctypeslib.as_array(logits, (len(ids), self.words)).copy()
        _function("llama_batch_free", None, _Batch)(batch)
        return torch.from_numpy(found).log_softmax(-1)

    def close(self) -> None:
        _function("llama_free", None, ctypes.c_void_p)(self._context)
        _function("llama_model_free", None, ctypes.c_void_p)(self._model)


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
    """``file``: ``ours`` with the data of packed tensors from llama.cpp's encoder; ``weights``: importance by GGUF's names."""
    shutil.copyfile(ours, file)
    originals = {tensor.name: tensor for tensor in gguf.GGUFReader(full).tensors}
    encode = _function(
        "ggml_quantize_chunk", ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
        ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    )  # fmt: skip
    for tensor in gguf.GGUFReader(file, "r+").tensors:
        if tensor.tensor_type.name in ("F32", "F16", "BF16"):
            continue
        original = originals[tensor.name]
        w = np.ascontiguousarray(gguf.dequantize(original.data, original.tensor_type), dtype=np.float32)
        weight = weights.get(tensor.name)
        data = np.empty(tensor.data.nbytes, dtype=np.uint8)
        held = None if weight is None else np.ascontiguousarray(weight.numpy(), dtype=np.float32)
        count = encode(
            tensor.tensor_type.value,
            w.ctypes.data,
            data.ctypes.data,
            0,
            *w.shape,
            None if held is None else held.ctypes.data,
        )
        assert count == data.nbytes, tensor.name
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

    def windows(name: str, part: str, count: int, length: int) -> Tensor:
        text = load_text(name, part, tokenizer).text
        ids = tokenizer(text[: 8 * count * length], return_tensors="pt").input_ids[0]
        return ids[: count * length].view(count, length)

    model = lowbit.load(arguments.model, dtype=torch.float32)
    names = GgufNames(gguf_architecture(model.config), model.config)
    found = importance(model, windows(arguments.calibration, "calibration", arguments.samples, 512))
    weights = {stored: w for name, w in found.items() if (stored := names.find(f"{name}.weight"))}
    del model
    print(f"importance of {len(weights)} tensors", flush=True)
    held_out = windows(arguments.text, "evaluation", arguments.windows, arguments.tokens)
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
    whole = {"xllamacpp": version("xllamacpp"), "windows": arguments.windows, "tokens": arguments.tokens, "rows": rows}
    if arguments.out:
        arguments.out.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
