"""Other engines as functions: what llama.cpp says of a prompt."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

LLAMA_CPP = "xllamacpp"


class LlamaCpp:
    """llama.cpp in this process, on one thread, with keys and values in float32.

    Args:
        file: a GGUF file.
    """

    def __init__(self, file: Path, context: int = 512):
        engine: Any = pytest.importorskip(LLAMA_CPP)
        parameters = engine.CommonParams()
        parameters.model.path = str(file)
        parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = context, 1, 0
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        parameters.warmup, parameters.verbosity = False, -1
        parameters.cache_type_k = parameters.cache_type_v = engine.ggml_type.GGML_TYPE_F32
        self._server = engine.Server(parameters)

    @property
    def url(self) -> str:
        """Where its HTTP server listens."""
        return self._server.listening_address

    def complete(
        self, prompt: str | list[int], new: int, top: int = 1, **options: Any
    ) -> list[list[tuple[int, float]]]:
        """Greedy tokens after a prompt: for each the ids and log probabilities of the ``top`` most likely."""
        asked = {"prompt": prompt, "n_predict": new, "temperature": 0, "n_probs": top, "cache_prompt": False}
        answer = self._server.handle_completions(asked | options)
        steps = answer["choices"][0]["logprobs"]["content"]
        return [[(each["id"], each["logprob"]) for each in step["top_logprobs"]] for step in steps]

    def most_likely(self, prompt: str | list[int], whole: int, top: int = 20) -> list[tuple[int, float]]:
        """Ids and log probabilities of the most likely next tokens.

        Args:
            prompt: text or ids.
            whole: a token with text, which is drawn whatever its probability: nothing is said of parts of a character.
            top: how many.
        """
        return self.complete(prompt, 1, top, logit_bias=[[whole, 1000.0]])[0]


def library() -> ctypes.CDLL:
    """llama.cpp's functions in C."""
    package: Any = pytest.importorskip(LLAMA_CPP)
    return ctypes.CDLL(next(str(file) for file in Path(package.__file__).parent.glob("*.so")))


def dequantized(name: str, data: Tensor) -> Tensor:
    """Rows of blocks of a type, uint8 ``[O, bytes]``, as llama.cpp decodes them."""
    elements, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    values = torch.empty(len(data), data.shape[1] // nbytes * elements)
    decode = getattr(library(), f"dequantize_row_{name.lower() if name[-1] != 'K' else name[:-1].lower() + 'K'}")
    decode(ctypes.c_void_p(data.data_ptr()), ctypes.c_void_p(values.data_ptr()), ctypes.c_int64(values.numel()))
    return values


def quantized_by_llama_cpp(name: str, w: Tensor) -> Tensor:
    """``w`` float32 ``[O, I]`` in a type, as llama.cpp chooses codes without an importance matrix: uint8 ``[O, bytes]``."""
    number = gguf.GGMLQuantizationType[name]
    elements, nbytes = gguf.GGML_QUANT_SIZES[number]
    rows, columns = w.shape
    data = torch.empty(rows, columns // elements * nbytes, dtype=torch.uint8)
    functions = library()
    functions.ggml_quantize_chunk.restype = ctypes.c_size_t
    functions.ggml_quantize_chunk(
        ctypes.c_int(number), ctypes.c_void_p(w.data_ptr()), ctypes.c_void_p(data.data_ptr()), ctypes.c_int64(0),
        ctypes.c_int64(rows), ctypes.c_int64(columns), None,
    )  # fmt: skip
    return data
