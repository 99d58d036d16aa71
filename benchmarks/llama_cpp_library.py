"""llama.cpp inside this process, through the shared library that xllamacpp brings: its encoders, and a model's log probabilities.

What gguf_blocks.py, gguf_encoders.py and llama_cpp_inputs.py share. Needs ``pip install --no-deps xllamacpp``.
"""

from __future__ import annotations

import ctypes
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import xllamacpp
from torch import Tensor

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


def function(name: str, returns: Any, *takes: Any) -> Any:
    function = getattr(LIBRARY, name)
    function.restype, function.argtypes = returns, takes
    return function


class LlamaCpp:
    """A file in llama.cpp on one thread: log probabilities of every token of windows of up to 512."""

    def __init__(self, file: Path):
        pointer = ctypes.c_void_p
        function("llama_backend_init", None)()
        defaults = function("llama_model_default_params", _Struct)()
        load = function("llama_model_load_from_file", pointer, ctypes.c_char_p, _Struct)
        self._model = load(str(file).encode(), defaults)
        context = function("llama_init_from_model", pointer, pointer, _Struct)
        self._context = context(self._model, function("llama_context_default_params", _Struct)())
        function("llama_set_n_threads", None, pointer, ctypes.c_int32, ctypes.c_int32)(self._context, 1, 1)
        vocabulary = function("llama_model_get_vocab", pointer, pointer)(self._model)
        self.words = function("llama_vocab_n_tokens", ctypes.c_int32, pointer)(vocabulary)

    def log_probabilities(self, ids: list[int]) -> Tensor:
        """``[tokens, vocabulary]``."""
        memory = function("llama_get_memory", ctypes.c_void_p, ctypes.c_void_p)(self._context)
        function("llama_memory_clear", None, ctypes.c_void_p, ctypes.c_bool)(memory, True)
        make = function("llama_batch_init", _Batch, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32)
        batch = make(len(ids), 0, 1)
        batch.count = len(ids)
        for i, each in enumerate(ids):
            batch.token[i], batch.pos[i], batch.seqs[i], batch.logits[i] = each, i, 1, 1
            batch.seq[i][0] = 0
        decode = function("llama_decode", ctypes.c_int32, ctypes.c_void_p, _Batch)
        if decode(self._context, batch) != 0:
            raise RuntimeError("llama.cpp could not decode a window")
        logits = function("llama_get_logits", ctypes.POINTER(ctypes.c_float), ctypes.c_void_p)(self._context)
        found = np.ctypeslib.as_array(logits, (len(ids), self.words)).copy()
        function("llama_batch_free", None, _Batch)(batch)
        return torch.from_numpy(found).log_softmax(-1)

    def close(self) -> None:
        function("llama_free", None, ctypes.c_void_p)(self._context)
        function("llama_model_free", None, ctypes.c_void_p)(self._model)


def encoded(w: Tensor, kind: gguf.GGMLQuantizationType, importance: Tensor | None) -> np.ndarray:
    """The bytes of ``w`` ``[O, I]`` by llama.cpp's encoder (``ggml_quantize_chunk``), uint8 ``[O, bytes of a row]``.

    Args:
        w: the weight.
        kind: the type of its blocks.
        importance: of each input channel ``[I]``; None: all alike.
    """
    encode = function(
        "ggml_quantize_chunk", ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
        ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    )  # fmt: skip
    w = w.float().contiguous()
    held = None if importance is None else importance.float().contiguous()
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    data = np.empty((w.shape[0], w.shape[1] // elements * nbytes), dtype=np.uint8)
    count = encode(kind.value, w.data_ptr(), data.ctypes.data, 0, *w.shape, None if held is None else held.data_ptr())
    assert count == data.nbytes
    return data


def token_windows(tokenizer: Any, name: str, part: Any, count: int, length: int) -> Tensor:
    """The first ``count`` windows of a text, ids ``[count, length]``."""
    text = load_text(name, part, tokenizer).text
    ids = tokenizer(text[: 8 * count * length], return_tensors="pt").input_ids[0]
    return ids[: count * length].view(count, length)


def write_rows(out: Path | None, rows: list[dict[str, Any]], **conditions: Any) -> None:
    """The results as JSON, with the version of llama.cpp and the conditions; nowhere if ``out`` is None."""
    if out is not None:
        out.write_text(json.dumps({"xllamacpp": version("xllamacpp"), **conditions, "rows": rows}, indent=1) + "\n")
