"""Speed of packed products: each kernel against torch's own products and the memory's own speed, in one run.

Weights are random and repeated until they far exceed the caches, like a model's layers. All candidates are called in
turn in every round, so other load on the machine affects all of them. Each figure is the best of its rounds.

Shapes: T token, O output channel, I input channel.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit.architectures.shapes import SHAPES, named_config
from lowbit.evaluation.random_model import linear_shapes, random_tensors
from lowbit.kernels import PackedLinear, native
from lowbit.kernels.product import Product
from lowbit.numerics import Int, PerGroup, Spec
from lowbit.progress import Progress

POOL_BYTES = 256 * 2**20
ROUNDS = 40
MANY = 32  # tokens; more tokens are measured in fewer rounds


@dataclass(frozen=True)
class KernelSpeed:
    """One kernel on one shape.

    Args:
        bits, group_size: format of the weight.
        input: how the float input is used: ``fixed`` (as exact as float32), ``int8`` (rounded, a scale for each 128
            channels), ``int8 a token`` (rounded, a scale for each token) or, with many tokens, ``bf16`` (as it is, by
            the way chosen for it).
        rows: tokens.
        shape: ``OxI``.
        us: microseconds of a call, including preparation of the input.
        gb_per_s: packed bytes over time.
        bandwidth_share: share of the speed at which memory is read in the same rounds.
        speedup_bf16, speedup_fp32: over torch's ``linear`` in that type.
        speedup_int4: over torch's own product with 4-bit weights, if the weight has 4 bits.
    """

    kernel: str
    bits: int
    group_size: int | None
    input: str
    rows: int
    shape: str
    us: float
    gb_per_s: float
    bandwidth_share: float
    speedup_bf16: float
    speedup_fp32: float
    speedup_int4: float | None

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, for JSON."""
        return asdict(self)


def shape_of(text: str) -> tuple[tuple[int, int], ...]:
    """The shape ``4096x11008`` (out x in), or the shapes of the linears of a model whose sizes have a name.

    Raises:
        ValueError: neither.
    """
    if text in SHAPES:
        return linear_shapes(named_config(text))
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"a shape is OUTxIN such as 4096x11008, or one of {', '.join(SHAPES)}; found {text!r}")
    return ((int(parts[0]), int(parts[1])),)


def measure_kernels(
    shapes: tuple[tuple[int, int], ...],
    bits: tuple[int, ...] = (8, 4, 3, 2, 1),
    rows: tuple[int, ...] = (1,),
    group_size: int = 128,
    *,
    progress: Progress | None = None,
) -> list[KernelSpeed]:
    """One :class:`KernelSpeed` for each shape, number of tokens, width and kind of input.

    Args:
        shapes: ``(O, I)`` of each weight.
        bits: widths of the codes.
        rows: numbers of tokens.
        group_size: weights that share a scale and a zero point.

    Raises:
        ValueError: there are no compiled kernels, or no integer grid has a width.
    """
    if not native.instruction_sets():
        raise ValueError("lowbit was installed without its compiled kernels; install a C++ compiler and reinstall it")
    speeds: list[KernelSpeed] = []
    total = len(shapes) * len(rows)
    for done, (shape, tokens) in enumerate((s, t) for s in shapes for t in rows):
        if progress:
            progress(done, total, f"{shape[0]}x{shape[1]}, {tokens} tokens")
        speeds += _one_shape(shape, tokens, bits, group_size)
    if progress:
        progress(total, total, "measured")
    return speeds


def _one_shape(shape: tuple[int, int], tokens: int, bits: tuple[int, ...], group_size: int) -> list[KernelSpeed]:
    isa = native.instruction_sets()[0]
    x_TI = torch.randn(tokens, shape[1])
    halves = x_TI.bfloat16()
    calls: dict[Any, tuple[int, Callable[[int], object]]] = {}  # key -> bytes of weight, call of the i-th round
    for b in bits:
        for name, grouped in (("fixed", True), ("bf16", True), ("int8", True), ("int8 a token", False)):
            if (name == "int8 a token" and b != 8) or (name == "bf16" and tokens <= MANY):
                continue
            spec = Spec(Int(b, symmetric=not grouped), PerGroup(group_size if grouped else shape[1]))
            pool = _pool(random_tiles(spec, shape))
            size = pool[0].numel()
            calls[(b, group_size if grouped else None, name)] = size, _packed_linear(isa, x_TI, pool, shape[0], name)
    memory = torch.empty(POOL_BYTES, dtype=torch.uint8)
    native.advise_large_pages(memory)
    memory.fill_(1)
    calls["read"] = POOL_BYTES, lambda i: native.read(isa, memory)
    calls["fp32"] = _torch_linear(x_TI, shape)
    calls["bf16"] = _torch_linear(halves, shape)
    if 4 in bits and tokens <= MANY and shape[1] % group_size == 0 and shape[0] % 64 == 0:
        calls["int4"] = _torch_int4(halves, shape, group_size)
    best = dict.fromkeys(calls, float("inf"))
    for i in range(ROUNDS if tokens <= MANY else 5):
        for key, (_, call) in calls.items():
            start = time.perf_counter()
            call(i)
            best[key] = min(best[key], time.perf_counter() - start)
    bandwidth = POOL_BYTES / best["read"]
    return [
        KernelSpeed(
            kernel=native.MATRIX_TILES.get(isa, isa) if tokens < native.TILE_ROWS else isa,
            bits=key[0],
            group_size=key[1],
            input=key[2],
            rows=tokens,
            shape=f"{shape[0]}x{shape[1]}",
            us=1e6 * best[key],
            gb_per_s=calls[key][0] / best[key] / 1e9,
            bandwidth_share=calls[key][0] / best[key] / bandwidth,
            speedup_bf16=best["bf16"] / best[key],
            speedup_fp32=best["fp32"] / best[key],
            speedup_int4=best["int4"] / best[key] if key[0] == 4 and "int4" in best else None,
        )
        for key in calls
        if isinstance(key, tuple)
    ]


def _packed_linear(isa: str, x_TI: Tensor, pool: list[Tensor], out: int, name: str) -> Callable[[int], object]:
    if name == "bf16":
        x, any_way = x_TI.bfloat16(), Product(native.UNIFORM, out, None, None, None)
        return lambda i: any_way(x, pool[i % len(pool)])
    if name == "int8 a token":
        halves = x_TI.bfloat16()
        return lambda i: native.linear(isa, halves, pool[i % len(pool)], out, act_bits=8)
    return lambda i: native.linear(isa, x_TI, pool[i % len(pool)], out, by_segment=name == "int8")


def random_tiles(spec: Spec, shape: tuple[int, int]) -> Tensor:
    """A weight of random codes and scales, packed for the compiled kernels. Nothing is quantized."""
    return native.pack(PackedLinear(spec, shape, random_tensors(spec, shape)))


def _pool(tiles: Tensor) -> list[Tensor]:
    """Copies of ``tiles`` in one piece of memory, enough that none is in a cache when its turn comes."""
    step = -(-tiles.numel() // 64) * 64
    count = max(1, -(-POOL_BYTES // step))
    memory = torch.empty(count * step + 64, dtype=torch.uint8)
    native.advise_large_pages(memory)
    start = -memory.data_ptr() % 64
    return [memory[start + i * step :][: tiles.numel()].copy_(tiles) for i in range(count)]


def _torch_linear(x_TI: Tensor, shape: tuple[int, int]) -> tuple[int, Callable[[int], object]]:
    size = shape[0] * shape[1] * x_TI.element_size()
    first = torch.randn(shape).to(x_TI.dtype)
    pool = [first.clone() for _ in range(max(1, -(-POOL_BYTES // size)))]
    return size, lambda i: F.linear(x_TI, pool[i % len(pool)])


def _torch_int4(x_TI: Tensor, shape: tuple[int, int], group_size: int) -> tuple[int, Callable[[int], object]]:
    codes = torch.randint(16, shape, dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.rand(shape[1] // group_size, shape[0], 2).bfloat16()
    pool = [packed.clone() for _ in range(max(1, -(-POOL_BYTES // packed.nbytes)))]
    return packed.nbytes, lambda i: torch.ops.aten._weight_int4pack_mm_for_cpu(
        x_TI, pool[i % len(pool)], group_size, scales
    )
