"""llama.cpp's own reader of GGUF files finds in an importance matrix what its quantizer asks for."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch

import lowbit
from lowbit.checkpoints.imatrix import read_imatrix
from lowbit.inspection import importance_matrix
from lowbit.numerics import mean_square

from engines import LLAMA_CPP, library
from helpers import random_ids, tiny_llama

pytest.importorskip(LLAMA_CPP)
F32, UINT32, STRING, ARRAY = 0, 4, 8, 9  # GGUF's numbers of types


class _Parameters(ctypes.Structure):
    """``gguf_init_params``: without a context for tensors, whose data are read at their offsets."""

    _fields_ = [("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p)]


class Reader:
    """``gguf_init_from_file`` and the functions that ``llama-quantize`` calls on its result."""

    def __init__(self, file):
        self._library = library()
        init = self._library.gguf_init_from_file
        init.restype, init.argtypes = ctypes.c_void_p, (ctypes.c_char_p, _Parameters)
        self._context = init(str(file).encode(), _Parameters(True, None))
        assert self._context, "llama.cpp does not take the file for GGUF"
        self._bytes = file.read_bytes()

    def call(self, name: str, returns: Any, *arguments: Any) -> Any:
        function = getattr(self._library, name)
        function.restype = returns
        function.argtypes = (ctypes.c_void_p, *(type(each) for each in arguments))
        return function(self._context, *arguments)

    def key(self, name: str) -> ctypes.c_int64:
        found = self.call("gguf_find_key", ctypes.c_int64, ctypes.c_char_p(name.encode()))
        assert found >= 0, name
        return ctypes.c_int64(found)

    def tensor(self, name: str) -> np.ndarray:
        found = self.call("gguf_find_tensor", ctypes.c_int64, ctypes.c_char_p(name.encode()))
        assert found >= 0, name
        number = ctypes.c_int64(found)
        assert self.call("gguf_get_tensor_type", ctypes.c_int, number) == F32
        start = self.call("gguf_get_data_offset", ctypes.c_size_t)
        start += self.call("gguf_get_tensor_offset", ctypes.c_size_t, number)
        size = self.call("gguf_get_tensor_size", ctypes.c_size_t, number)
        return np.frombuffer(self._bytes[start : start + size], "<f4")


def test_keys_and_tensors_are_found_with_the_types_and_sizes_that_its_quantizer_reads(tmp_path):
    model = tiny_llama(tmp_path / "model", intermediate_size=128)
    importance_matrix(model, random_ids(3, 16), out=tmp_path / "x.gguf")
    reader, entries = Reader(tmp_path / "x.gguf"), read_imatrix(tmp_path / "x.gguf").entries
    for name, value in (("imatrix.chunk_count", 3), ("imatrix.chunk_size", 16)):
        assert reader.call("gguf_get_kv_type", ctypes.c_int, reader.key(name)) == UINT32
        assert reader.call("gguf_get_val_u32", ctypes.c_uint32, reader.key(name)) == value
    datasets = reader.key("imatrix.datasets")
    assert reader.call("gguf_get_kv_type", ctypes.c_int, datasets) == ARRAY
    assert reader.call("gguf_get_arr_type", ctypes.c_int, datasets) == STRING
    assert reader.call("gguf_get_arr_str", ctypes.c_char_p, datasets, ctypes.c_size_t(0)) == b"token ids"
    assert reader.call("gguf_get_val_str", ctypes.c_char_p, reader.key("general.type")) == b"imatrix"
    assert reader.call("gguf_get_n_tensors", ctypes.c_int64) == 2 * len(entries) == 28
    for name, entry in entries.items():
        sums, count = reader.tensor(f"{name}.in_sum2"), reader.tensor(f"{name}.counts")
        assert count.item() == 48 and len(sums) == len(entry) - 1
        assert torch.allclose(torch.from_numpy(sums / count), mean_square(entry), rtol=1e-6)


def test_a_run_without_text_on_the_file_is_exported_in_types_of_llama_cpp(tmp_path):
    model = tiny_llama(tmp_path / "model", intermediate_size=256, hidden_size=256)
    importance_matrix(model, random_ids(3, 16), out=tmp_path / "x.gguf")
    recipe = lowbit.recipe("rtn", importance=True)
    report = lowbit.quantize(model, recipe, str(tmp_path / "x.gguf"), out=tmp_path / "out", format="gguf:q4_k_m")
    assert "importance matrix x.gguf" in report.calibration and (tmp_path / "out" / "model.gguf").is_file()
