"""The Triton kernels where there is no GPU: who gets which reason, their laws in triton's interpreter, and whether the real
compiler takes them for real GPUs."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_native import weight

from lowbit import kernels
from lowbit.kernels import PackedLinear, triton
from lowbit.layouts import pack_qtensor
from lowbit.numerics import NF4, BinaryCoded, Codebook, Flat, Int, PerChannel, PerGroup, PerToken, Spec

INSTALLED = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not INSTALLED, reason="triton is not installed (it exists for Linux only)")
FOUR = Spec(Int(4), PerGroup(64))
EIGHT = Spec(Int(8), PerChannel())


def layer(spec: Spec, shape=(40, 129), act: Spec | None = None) -> PackedLinear:
    return PackedLinear(spec, shape, pack_qtensor(weight(spec, shape)), act)


def on(device: str, spec: Spec = FOUR, shape=(40, 129)) -> PackedLinear:
    """A layer that says it is on ``device``, of which the machine has none."""
    where = SimpleNamespace(device=torch.device(device))
    return PackedLinear(spec, shape, {"codes": where})  # pyright: ignore[reportArgumentType]


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU that triton compiles for, and all that triton needs."""
    monkeypatch.setattr(triton, "_missing", lambda interpreted: None)
    monkeypatch.setattr(triton, "_too_old", lambda index: None)
    monkeypatch.setattr(triton, "interpreted", lambda: False)


def reasons(packed: PackedLinear) -> dict[str, str | None]:
    return {reason.kernel: reason.why_not for reason in kernels.explain(packed, 1)}


# Reasons


def test_a_layer_on_a_gpu_runs_by_triton_and_the_cpu_kernels_say_where_it_is(gpu):
    said = reasons(on("cuda:0"))
    assert said.pop("triton") is None
    assert all(
        why and ("cuda" in why or why == "the input is not quantized" or "asked first" in why) for why in said.values()
    )


def test_a_layer_on_a_cpu_is_not_for_triton(monkeypatch):
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    assert "written for GPUs, the layer is on cpu" in str(reasons(layer(FOUR))["triton"])
    assert "CUDA and ROCm devices only, the layer is on meta" in str(reasons(on("meta"))["triton"])


def test_a_gpu_without_triton_says_what_is_missing_and_what_runs_instead(gpu, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    monkeypatch.setattr(triton, "_too_old", lambda index: None)
    triton._missing.cache_clear()
    try:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        said = reasons(on("cuda:0"))
        assert "triton is not installed (pip install 'lowbit[gpu]'); the weight is decoded" in str(said["triton"])
        assert [kernel for kernel, why in said.items() if why is None] == ["reference"]
        triton._missing.cache_clear()
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin="triton/__init__.py"))
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", "")
        assert "with a C compiler and there is none" in str(reasons(on("cuda:0"))["triton"])
    finally:
        triton._missing.cache_clear()


def test_a_gpu_that_triton_does_not_compile_for_is_named(monkeypatch):
    monkeypatch.setattr(triton, "_missing", lambda interpreted: None)
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    triton._too_old.cache_clear()
    try:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
        assert "compute capability 8.0 and newer, this GPU has 7.5" in str(reasons(on("cuda:0"))["triton"])
        triton._too_old.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6))
        assert reasons(on("cuda:0"))["triton"] is None
    finally:
        triton._too_old.cache_clear()


@pytest.mark.parametrize(
    ("spec", "shape", "reason"),
    [
        (Spec(Int(4), Flat(64)), (40, 100), "groups within a row, or blocks"),
        (Spec(Int(4), PerToken()), (40, 129), "groups within a row, or blocks"),
        (Spec(Int(8), PerGroup(1)), (2**16, 2**12), "more parameters than 32-bit indices reach"),
    ],
    ids=str,
)
def test_layers_that_it_does_not_take_say_why(gpu, spec, shape, reason):
    assert reason in str(triton.why_not(on("cuda:0", spec, shape), 1))


def test_a_grid_that_it_does_not_know_is_named(gpu):
    known = SimpleNamespace(grid=SimpleNamespace(bits=4), granularity=PerChannel())
    packed = PackedLinear(known, (40, 129), on("cuda:0").tensors)  # pyright: ignore[reportArgumentType]
    assert triton.why_not(packed, 1) == "weights are SimpleNamespace, which has no Triton kernel"


def test_lowbit_runs_without_triton_and_does_not_import_it_by_itself():
    code = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch, lowbit
from lowbit.numerics import Int, MinMax, PerGroup, Spec, quantize
layer = lowbit.modules.QuantLinear.from_qtensor(quantize(torch.randn(8, 32), Spec(Int(4), PerGroup(16)), MinMax()))
assert layer(torch.randn(2, 32)).shape == (2, 8)
assert "lowbit.kernels.triton.launch" not in sys.modules  # which imports triton
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
    assert run.returncode == 0, run.stderr


# Laws


@needs_triton
def test_the_laws_hold_on_this_machines_gpu_or_in_the_interpreter():
    """In a process of its own, because triton settles at its import whether it compiles or interprets."""
    env = _environment() | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).with_name("triton_laws.py")),
        str(Path(__file__).with_name("triton_cache_laws.py")),
    ]
    done = subprocess.run(command, env=env, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def _environment() -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if name not in ("LOWBIT_KERNELS", "TRITON_INTERPRET")}
    return env | {"OMP_NUM_THREADS": "1"}


# The compiler

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
}  # fmt: skip


class Compiled:
    """In the place of a kernel: compiles it for a GPU that need not be there, as a launch would, and launches nothing."""

    def __init__(self, kernel, target):
        self.kernel, self.target, self.found = kernel, target, []

    def __getitem__(self, grid):
        return self._call

    def _call(self, *args, num_warps: int = 4, num_stages: int = 2, **constants):
        from triton import compile
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature, attributes = {}, {}
        for i, (name, value) in enumerate(zip(self.kernel.arg_names, args)):
            if isinstance(value, torch.Tensor):
                signature[name], attributes[(i,)] = _TYPES[value.dtype], [["tt.divisibility", 16]]
            elif value is None or value == 1:  # triton takes these as constants
                signature[name], constants[name] = "constexpr", value
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
                if signature[name] == "i32" and value % 16 == 0:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(self.kernel, {n: signature[n] for n in self.kernel.arg_names}, constants, attributes)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        self.found.append(compile(source, target=GPUTarget(*TARGETS[self.target]), options=options))


@needs_triton
@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="TRITON_INTERPRET is set: triton does not compile")
@pytest.mark.parametrize(
    ("target", "spec", "rows", "dtype", "act", "instruction"),
    [
        ("sm_80", FOUR, 1, torch.float16, None, "fma.rn.f32"),
        ("sm_80", Spec(Int(3), PerGroup(128)), 8, torch.bfloat16, None, "mma.sync.aligned.m16n8k16.row.col.f32.bf16"),
        ("sm_80", Spec(Int(5, zero="real"), PerGroup(48)), 8, torch.float32, None, "fma.rn.f32"),
        ("sm_80", Spec(Codebook(4), PerChannel()), 32, torch.float16, None, "mma.sync.aligned.m16n8k16.row.col.f32.f16"),
        ("sm_80", EIGHT, 8, torch.float16, Spec(Int(8), PerToken()), "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8"),
        ("sm_90", Spec(NF4, PerGroup(64)), 64, torch.bfloat16, None, "wgmma.mma_async.sync.aligned"),
        ("gfx942", Spec(BinaryCoded(2), PerGroup(64)), 32, torch.float16, None, "v_mfma_f32"),
        ("gfx942", Spec(Int(8, True), PerChannel()), 64, torch.float16, Spec(Int(8, True), PerToken()), "v_mfma_i32"),
    ],
    ids=str,
)  # fmt: skip
def test_the_compiler_takes_every_kernel_and_uses_the_matrix_instructions(
    target, spec, rows, dtype, act, instruction, monkeypatch, tmp_path
):
    """What the interpreter cannot see: types, shapes and layouts that only the compiler checks. Speed is not measured."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from lowbit.kernels.triton import device, launch

    compiled = [Compiled(getattr(device, name), target) for name in ("linear", "linear_int8", "quantize")]
    for each in compiled:
        monkeypatch.setattr(device, each.kernel.fn.__name__, each)
    launch.linear(torch.zeros(rows, 512, dtype=dtype), layer(spec, (256, 512), act))
    product, integer, quantized = (each.found for each in compiled)
    assert (len(product), len(integer), len(quantized)) == ((1, 0, 0) if act is None else (0, 1, 1))
    (found,) = product or integer
    assert instruction in found.asm["amdgcn" if TARGETS[target][0] == "hip" else "ptx"]
    assert found.metadata.shared <= 2**16  # what every supported GPU has for one program


def test_channels_over_a_threshold_are_refused_with_the_reason(gpu):
    packed = dataclasses.replace(on("cuda:0", EIGHT), threshold=6.0)
    assert "over a threshold" in str(triton.why_not(packed, 1))


@needs_triton
@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="TRITON_INTERPRET is set: triton does not compile")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("pair", [0, 1, 3])
def test_the_compiler_takes_the_kernels_of_packed_tokens(target, pair, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from test_packed_attention import layer_of, query_of
    from triton_cache_laws import PAIRS

    from lowbit.caches import on_gpu
    from lowbit.kernels.triton import packed_tokens

    compiled = [Compiled(getattr(packed_tokens, name), target) for name in ("score_tiles", "mix_tiles")]
    for each in compiled:
        monkeypatch.setattr(packed_tokens, each.kernel.fn.__name__, each)
    layer, query = layer_of(*PAIRS[pair], count=120), query_of(heads=2)
    on_gpu.attend(query, layer, torch.ones(2, 1, 120, dtype=torch.bool))
    assert [len(each.found) for each in compiled] == [1, 1]
