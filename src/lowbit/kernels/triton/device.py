"""The code that the GPU runs. One program computes a tile of the output ``[T, O]`` and decodes the weights it needs.

A row of codes is a bit stream, read in words. A word is the fewest bytes that hold whole codes (1 byte at 1, 2, 4 and 8
bits; 3 bytes with 8 codes at 3 bits), gathered into one integer and shifted apart. No code crosses a word, so one function
serves all widths.

Parameters belong to rectangles of ``share`` rows by ``group`` columns. A tile loads them once for each SPAN columns, the
longest run that always lies within one group, and repeats them.

Shapes: T token, O output channel, I input channel; N and K: the tile's part of O and of I.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportOptionalOperand=false, reportReturnType=false, reportUnboundVariable=false
# (These functions are parsed by triton, which decides an `if` over constants before it looks at the branches.)

import triton
import triton.language as tl

from lowbit.kernels import native

INTERPRETED = bool(triton.knobs.runtime.interpret)
UNIFORM = tl.constexpr(native.UNIFORM)
TABLE = tl.constexpr(native.TABLE)
CODEBOOK = tl.constexpr(native.CODEBOOK)
# Storage of the zero point of a uniform grid.
CONSTANT = tl.constexpr(0)
CODES = tl.constexpr(1)
FLOATING = tl.constexpr(2)
# Adding and subtracting it rounds a float32 below 2**22 to the nearest integer, half to even.
ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def unpack(
    codes, start_N, valid_N, k0, row_bytes,
    BITS: tl.constexpr, PER: tl.constexpr, USED: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Codes ``[N, K]`` int32 of the rows that begin at byte ``start_N``, from column ``k0``, a multiple of PER.

    A word has USED bytes and PER codes. Bytes beyond the end of a row count as zero.
    """
    first_W = (k0 // PER + tl.arange(0, K // PER)) * USED
    word_NW = tl.zeros((N, K // PER), tl.int64 if USED > 4 else tl.int32)
    for i in tl.static_range(USED):
        at_W = first_W + i
        byte_NW = tl.load(
            codes + start_N[:, None] + at_W[None, :], mask=valid_N[:, None] & (at_W < row_bytes)[None, :], other=0
        )
        word_NW |= byte_NW.to(word_NW.dtype) << (8 * i)
    shift_P = tl.arange(0, PER) * BITS
    fields_NWP = (word_NW[:, :, None] >> shift_P[None, None, :].to(word_NW.dtype)) & (2**BITS - 1)
    return tl.reshape(fields_NWP, (N, K)).to(tl.int32)


@triton.jit
def unpack_at(stream, index, valid, BITS: tl.constexpr):
    """Single codes of one bit stream, int32 in the shape of ``index``."""
    bit = index * BITS
    code = tl.load(stream + bit // 8, mask=valid, other=0).to(tl.int32)
    if 8 % BITS != 0:
        crosses = (bit % 8 + BITS) > 8
        code |= tl.load(stream + bit // 8 + 1, mask=valid & crosses, other=0).to(tl.int32) << 8
    return (code >> (bit % 8).to(tl.int32)) & (2**BITS - 1)


@triton.jit
def spread(x_NS, SPAN: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """``[N, K / SPAN]`` to ``[N, K]``: repeats each column SPAN times."""
    return tl.reshape(tl.broadcast_to(x_NS[:, :, None], (N, K // SPAN, SPAN)), (N, K))


@triton.jit
def decode(
    codes, first, second, table, o_N, valid_N, k0, I, row_bytes, share, group, columns, constant,
    KIND: tl.constexpr, ZERO: tl.constexpr, BITS: tl.constexpr, PER: tl.constexpr, USED: tl.constexpr,
    SPAN: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Weights ``[N, K]`` float32 of rows ``o_N`` from column ``k0``; beyond the end of a row they are any finite values.

    ``first`` and ``second`` are the parameters as stored: scale and zero, values, or alpha and offset.
    """
    code_NK = unpack(codes, o_N * row_bytes, valid_N, k0, row_bytes, BITS, PER, USED, N, K)
    k_S = k0 + tl.arange(0, K // SPAN) * SPAN
    at_NS = (o_N.to(tl.int32) // share * columns)[:, None] + (k_S // group)[None, :]
    ok_NS = valid_N[:, None] & (k_S < I)[None, :]
    if KIND == UNIFORM:
        if ZERO == CONSTANT:
            level_NK = code_NK.to(tl.float32) - constant
        else:
            if ZERO == CODES:
                zero_NS = unpack_at(second, at_NS, ok_NS, BITS).to(tl.float32)
            else:
                zero_NS = tl.load(second + at_NS, mask=ok_NS, other=0).to(tl.float32)
            level_NK = code_NK.to(tl.float32) - spread(zero_NS, SPAN, N, K)
        scale_NS = tl.load(first + at_NS, mask=ok_NS, other=0).to(tl.float32)
        w_NK = level_NK * spread(scale_NS, SPAN, N, K)
    elif KIND == TABLE:
        scale_NS = tl.load(first + at_NS, mask=ok_NS, other=0).to(tl.float32)
        w_NK = tl.load(table + code_NK) * spread(scale_NS, SPAN, N, K)  # the table has a value for every code
    elif KIND == CODEBOOK:
        at_NK = (spread(at_NS, SPAN, N, K) << BITS) + code_NK
        ok_NK = valid_N[:, None] & (k0 + tl.arange(0, K) < I)[None, :]
        w_NK = tl.load(first + at_NK, mask=ok_NK, other=0).to(tl.float32)
    else:
        w_NK = tl.zeros((N, K), tl.float32)
        if ZERO == FLOATING:
            w_NK += spread(tl.load(second + at_NS, mask=ok_NS, other=0).to(tl.float32), SPAN, N, K)
        for plane in tl.static_range(BITS):
            alpha_NS = tl.load(first + at_NS * BITS + plane, mask=ok_NS, other=0).to(tl.float32)
            alpha_NK = spread(alpha_NS, SPAN, N, K)
            w_NK += tl.where((code_NK >> plane) & 1 != 0, alpha_NK, -alpha_NK)
    return w_NK


@triton.jit
def linear(
    x, y, codes, first, second, table, T, O, I, stride_t, stride_i, row_bytes, share, group, columns, constant,
    KIND: tl.constexpr, ZERO: tl.constexpr, BITS: tl.constexpr, PER: tl.constexpr, USED: tl.constexpr,
    SPAN: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """``y[T, O] = x[T, I] @ decode(codes).T``, sums in float32.

    M is 1, with one program for each token, or at least 16. WIDEN: multiply in float32 for any dtype of x.
    """
    t_M = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    o_N = tl.program_id(1).to(tl.int64) * N + tl.arange(0, N)
    there_M, valid_N = t_M < T, o_N < O
    if M == 1:
        sum_NK = tl.zeros((N, K), tl.float32)
    else:
        sum_MN = tl.zeros((M, N), tl.float32)
    for k0 in range(0, I, K):
        w_NK = decode(
            codes, first, second, table, o_N, valid_N, k0, I, row_bytes, share, group, columns, constant,
            KIND, ZERO, BITS, PER, USED, SPAN, N, K,
        )  # fmt: skip
        k_K = k0 + tl.arange(0, K)
        x_MK = tl.load(
            x + t_M[:, None] * stride_t + k_K[None, :] * stride_i, mask=there_M[:, None] & (k_K < I)[None, :], other=0
        )
        if M == 1:
            sum_NK += w_NK * x_MK.to(tl.float32)
        else:
            if WIDEN:
                x_MK = x_MK.to(tl.float32)
            sum_MN = tl.dot(x_MK, tl.trans(w_NK.to(x_MK.dtype)), sum_MN, input_precision="ieee")
    if M == 1:
        sum_MN = tl.sum(sum_NK, 1)[None, :]
    tl.store(
        y + t_M[:, None] * O + o_N[None, :], sum_MN.to(y.dtype.element_ty), mask=there_M[:, None] & valid_N[None, :]
    )


@triton.jit
def quantize(
    x, codes, scale_T, zero_T, sum_T, given_scale, given_zero, I, stride_t, stride_i,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, REACH: tl.constexpr, GIVEN: tl.constexpr, NOTHING: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """Quantizes a token ``x[I]`` to int8 around the middle of the grid; stores its scale, zero point and sum of codes.

    It computes :func:`lowbit.kernels.activation.quantize_activation`, with one pass for the range (unless it is GIVEN) and one
    pass for rounding. The scale is NaN if the token holds NaN, or if its range is infinite.
    """
    MAX: tl.constexpr = 2**BITS - 1
    MIDDLE: tl.constexpr = 2 ** (BITS - 1)
    t = tl.program_id(0).to(tl.int64)
    k_K = tl.arange(0, K)
    if GIVEN:
        scale = tl.load(given_scale).to(tl.float32)
    else:
        lo_K = tl.zeros((K,), tl.float32)  # the range holds zero, for both grids
        hi_K = tl.zeros((K,), tl.float32)
        for k0 in range(0, I, K):
            v_K = tl.load(x + t * stride_t + (k0 + k_K) * stride_i, mask=k0 + k_K < I, other=0).to(tl.float32)
            lo_K, hi_K = tl.where(v_K < lo_K, v_K, lo_K), tl.where(v_K > hi_K, v_K, hi_K)
        lo, hi = tl.min(lo_K, 0) * REACH, tl.max(hi_K, 0) * REACH
        if SYMMETRIC:
            scale = tl.math.div_rn(tl.maximum(-lo, hi), MAX // 2 + 0.0)
            scale = tl.where(scale > 0, scale, NOTHING)
        else:
            scale = tl.math.div_rn(hi - lo, MAX + 0.0)
            scale = tl.where(scale > 0, scale, tl.where(hi > 0, hi, NOTHING))
    finite = tl.abs(scale) < float("inf")
    step = tl.where(finite, scale, 1.0)
    zero = MIDDLE + 0.0
    if not SYMMETRIC:
        if GIVEN:
            zero = tl.load(given_zero).to(tl.float32)
        else:
            zero = tl.minimum(tl.maximum(tl.math.div_rn(-lo, step), 0.0), MAX + 0.0)
            zero = (zero + ROUNDER) - ROUNDER
    nan_K = tl.zeros((K,), tl.int32)
    sum_K = tl.zeros((K,), tl.int32)
    for k0 in range(0, I, K):
        inside_K = k0 + k_K < I
        v_K = tl.load(x + t * stride_t + (k0 + k_K) * stride_i, mask=inside_K, other=0).to(tl.float32)
        nan_K |= (v_K != v_K).to(tl.int32)
        level_K = tl.math.div_rn(tl.where(v_K != v_K, 0.0, v_K), step)
        level_K = tl.minimum(tl.maximum(level_K, -1024.0), 1024.0)  # codes clip earlier, and rounding stays exact
        if SYMMETRIC:
            level_K = ((level_K + MIDDLE) + ROUNDER) - ROUNDER
        else:
            level_K = ((level_K + ROUNDER) - ROUNDER) + zero
        code_K = tl.minimum(tl.maximum(level_K, 0.0), MAX + 0.0).to(tl.int32) - MIDDLE
        tl.store(codes + t * I + k0 + k_K, code_K.to(tl.int8), mask=inside_K)
        sum_K += tl.where(inside_K, code_K, 0)
    broken = (tl.max(nan_K, 0) != 0) | (not finite)
    tl.store(scale_T + t, tl.where(broken, float("nan"), scale))
    tl.store(zero_T + t, zero.to(tl.int32) - MIDDLE)
    tl.store(sum_T + t, tl.sum(sum_K, 0))


@triton.jit
def linear_int8(
    a, a_scale_T, a_zero_T, a_sum_T, y, codes, scale, zero, T, O, I, row_bytes, share,
    A_ZERO: tl.constexpr, ZERO: tl.constexpr, BITS: tl.constexpr, PER: tl.constexpr, USED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """``y[T, O]`` from tokens ``a[T, I]`` int8 made by :func:`quantize`; one weight scale for each ``share`` rows.

    With b the weight's codes around the middle of their grid, like a, and za, zb the zero points,

        sum_I (a - za)(b - zb) = sum_I ab - zb sum_I a - za (sum_I b - I zb)

    exactly in int32; the scales come last. Codes around the middle also keep the sum of ab within int32, where NVIDIA's
    instruction saturates.
    """
    MIDDLE: tl.constexpr = 2 ** (BITS - 1)
    t_M = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    o_N = tl.program_id(1).to(tl.int64) * N + tl.arange(0, N)
    there_M, valid_N = t_M < T, o_N < O
    sum_MN = tl.zeros((M, N), tl.int32)
    sum_N = tl.zeros((N,), tl.int32)
    for k0 in range(0, I, K):
        k_K = k0 + tl.arange(0, K)
        b_NK = unpack(codes, o_N * row_bytes, valid_N, k0, row_bytes, BITS, PER, USED, N, K) - MIDDLE
        a_MK = tl.load(a + t_M[:, None] * I + k_K[None, :], mask=there_M[:, None] & (k_K < I)[None, :], other=0)
        sum_MN = tl.dot(a_MK, tl.trans(b_NK.to(tl.int8)), sum_MN, out_dtype=tl.int32)
        if A_ZERO:
            sum_N += tl.sum(tl.where((k_K < I)[None, :], b_NK, 0), 1)
    at_N = o_N.to(tl.int32) // share
    if ZERO == CODES:
        zero_N = unpack_at(zero, at_N, valid_N, BITS) - MIDDLE
        sum_MN -= tl.load(a_sum_T + t_M, mask=there_M, other=0)[:, None] * zero_N[None, :]
        sum_N -= I * zero_N
    if A_ZERO:
        sum_MN -= tl.load(a_zero_T + t_M, mask=there_M, other=0)[:, None] * sum_N[None, :]
    y_MN = sum_MN.to(tl.float32) * tl.load(a_scale_T + t_M, mask=there_M, other=0)[:, None]
    y_MN *= tl.load(scale + at_N, mask=valid_N, other=0).to(tl.float32)[None, :]
    tl.store(y + t_M[:, None] * O + o_N[None, :], y_MN.to(y.dtype.element_ty), mask=there_M[:, None] & valid_N[None, :])
