"""int4 weights times activations of 8 bits, on tensor cores that multiply 8 bits: int8 x int8 in
sums of int32, and fp8 x fp8 (e4m3) in sums of fp32.

    y_mn = t_m * sum_c s_nc * (sum_(k in c) q_nk p_mk - z_nc sum_(k in c) p_mk) + b_n

p are the codes of x, t their scales, q those of W in groups c with scales s and zeros z. Weights
are the left operand, as in `tile.py`. They become 8 bits in registers, multiplied by UNIT: int8
16 q is a nibble in the upper half of its byte, and e4m3 2^-9 q is a byte of a sign and of the
subnormal |q|. Both are exact. The scale of a group multiplies the sum over it, never a weight.
SEQUENCE "plain" is the path without assembly, which Triton's interpreter runs and which is the
oracle of the other. `layout8` says how nibbles are ordered.
"""

import triton
import triton.language as tl

_REGISTERS = tl.constexpr("=r,=r,r")
# One word of eight nibbles c + 8 to eight int8 16 c: four of the lower nibbles, four of the upper.
# lop3 (a & b) ^ c is table 0x6A.
_INT8 = tl.constexpr("""{
    .reg .b32 low;
    shl.b32 low, $2, 4;
    lop3.b32 $0, low, 0xF0F0F0F0, 0x80808080, 0x6A;
    lop3.b32 $1, $2, 0xF0F0F0F0, 0x80808080, 0x6A;
}""")
# One word of eight nibbles, a sign b over m, for c = m or -1 - m, to eight e4m3: a byte is
# m + 0x81 b, since -1 - m is the sign 0x80 and the subnormal m + 1.
_FP8 = tl.constexpr("""{
    .reg .b32 m0, m1, b0, b1, s3, s4, s7;
    shr.u32 s3, $2, 3;
    shr.u32 s4, $2, 4;
    shr.u32 s7, $2, 7;
    and.b32 m0, $2, 0x07070707;
    and.b32 m1, s4, 0x07070707;
    and.b32 b0, s3, 0x01010101;
    and.b32 b1, s7, 0x01010101;
    mad.lo.u32 $0, b0, 0x81, m0;
    mad.lo.u32 $1, b1, 0x81, m1;
}""")
# 1.5 * 2^23: fp32 whose last bit counts 1. An integer below 2^22 added to its bits adds to it.
_MAGIC_BITS = tl.constexpr(0x4B400000)
_MAGIC = tl.constexpr(12582912.0)


@triton.jit
def codes(words, NUMBERS: tl.constexpr, SEQUENCE: tl.constexpr):
    """uint8 [R, C] -> UNIT * codes [R, 2C] in int8 or e4m3, in the order e of each 32-bit word."""
    R: tl.constexpr = words.shape[0]
    C: tl.constexpr = words.shape[1]
    if SEQUENCE == "plain":
        if NUMBERS == "int8":
            first = ((words << 4) ^ 0x80).to(tl.int8, bitcast=True)
            second = ((words & 0xF0) ^ 0x80).to(tl.int8, bitcast=True)
        else:
            first = ((words & 7) + ((words >> 3) & 1) * 0x81).to(tl.float8e4nv, bitcast=True)
            second = (((words >> 4) & 7) + (words >> 7) * 0x81).to(tl.float8e4nv, bitcast=True)
    elif NUMBERS == "int8":
        first, second = tl.inline_asm_elementwise(
            _INT8, _REGISTERS, [words], (tl.int8, tl.int8), True, 4
        )
    else:
        first, second = tl.inline_asm_elementwise(
            _FP8, _REGISTERS, [words], (tl.float8e4nv, tl.float8e4nv), True, 4
        )
    return tl.join(first, second).reshape(R, C // 4, 4, 2).trans(0, 1, 3, 2).reshape(R, C * 2)


@triton.jit
def in_order(nibbles, NB: tl.constexpr, KB: tl.constexpr, LAYOUT: tl.constexpr):
    """[NB*KB, 4096] in the nibble order of LAYOUT -> [64 NB, 64 KB] in the order of n and k; no
    data moves between threads."""
    if LAYOUT == "wgmma8":  # nb kb w g t j h r p -> nb w r g, kb j h t p
        ordered = nibbles.reshape(NB, KB, 4, 8, 4, 2, 2, 2, 4).trans(0, 2, 7, 3, 1, 5, 6, 4, 8)
    else:  # nb kb w g t r j e -> nb w r g, kb j t e
        ordered = nibbles.reshape(NB, KB, 4, 8, 4, 2, 2, 8).trans(0, 2, 5, 3, 1, 6, 4, 7)
    return ordered.reshape(64 * NB, 64 * KB)


@triton.jit
def halves_in_order(nibbles, NB: tl.constexpr, LAYOUT: tl.constexpr):
    """[NB, 4096] -> two [64 NB, 32]: the first 32 of every 64 channels, and the others."""
    if LAYOUT == "wgmma8":  # j last
        ordered = nibbles.reshape(NB, 4, 8, 4, 2, 2, 2, 4).trans(0, 1, 6, 2, 5, 3, 7, 4)
    else:
        ordered = nibbles.reshape(NB, 4, 8, 4, 2, 2, 8).trans(0, 1, 4, 2, 3, 6, 5)
    first, second = tl.split(ordered)
    return first.reshape(64 * NB, 32), second.reshape(64 * NB, 32)


@triton.jit
def beside(ptr, row, rn, N_PAD):
    """fp32 [rn] of a row of scales or zeros. Those of 16 bits come as int32 pairs: narrower loads
    are not pipelined."""
    if ptr.dtype.element_ty == tl.float32:
        values = tl.load(ptr + (row * N_PAD + rn))
    else:
        DTYPE: tl.constexpr = ptr.dtype.element_ty
        pairs = ptr.to(tl.pointer_type(tl.int32))
        word = tl.load(pairs + (row * (N_PAD >> 1) + (rn >> 1)))
        values = (word >> ((rn & 1) * 16)).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return values


@triton.jit
def exact(w, x, NUMBERS: tl.constexpr):
    """fp32 w @ x of one group: of int8 exactly, without a conversion of integers."""
    if NUMBERS == "int8":
        zero = tl.full((w.shape[0], x.shape[1]), _MAGIC_BITS, tl.int32)
        dots = tl.dot(w, x, zero, out_dtype=tl.int32).to(tl.float32, bitcast=True) - _MAGIC
    else:
        dots = tl.dot(w, x)
    return dots


@triton.jit
def scaled(
    dots, group, scales_ptr, zeros_ptr, sums_ptr, rm, live, rn, N_PAD, SUMS, ZEROS: tl.constexpr
):
    """s (dots - z sum p) of one group, [BN, BM]."""
    if ZEROS:
        z = beside(zeros_ptr, group, rn, N_PAD)
        total = tl.load(sums_ptr + group * SUMS + rm, mask=live, other=0.0)
        dots -= z[:, None] * total[None, :]
    return dots * beside(scales_ptr, group, rn, N_PAD)[:, None]


@triton.jit
def product(
    x_rows,
    live,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    sums_ptr,
    rm,
    rn,
    K,
    N_PAD,
    SUMS,
    first,
    step,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    NUMBERS: tl.constexpr,
    LAYOUT: tl.constexpr,
    SEQUENCE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """fp32 UNIT * sum_c s_c (...) [BN, BM] over the k tiles first, first + step, ...

    x_rows: pointers [BM] to rows of codes of x, read where `live`. words_ptr: this block of n.
    scales_ptr, zeros_ptr: [K / GROUP, N_PAD]; rn: [BN] their columns. sums_ptr: fp32 [K / GROUP,
    SUMS], UNIT times the sums of the codes of x over each group; rm: [BM] their columns. GROUP = 0:
    one scale per row.
    """
    NB: tl.constexpr = BN // 64
    KB: tl.constexpr = BK // 64
    atoms = (
        tl.arange(0, NB)[:, None, None] * (K // 64 * 2048) + tl.arange(0, KB)[None, :, None] * 2048
    )
    words_ptrs = words_ptr + first * KB * 2048 + atoms + tl.arange(0, 2048)[None, None, :]
    x_ptrs = x_rows[None, :] + first * BK + tl.arange(0, 32 if GROUP == 32 else BK)[:, None]
    WHOLE: tl.constexpr = tl.int32 if GROUP == 0 and NUMBERS == "int8" else tl.float32
    acc = tl.zeros((BN, BM), WHOLE)
    for tile in tl.range(first, K // BK, step, num_stages=STAGES):
        words = tl.load(words_ptrs, eviction_policy="evict_first").reshape(NB * KB, 2048)
        nibbles = codes(words, NUMBERS, SEQUENCE)
        if GROUP == 32:
            w0, w1 = halves_in_order(nibbles, NB, LAYOUT)
            x0 = tl.load(x_ptrs, mask=live[None, :], other=0.0)
            x1 = tl.load(x_ptrs + 32, mask=live[None, :], other=0.0)
            acc += scaled(
                exact(w0, x0, NUMBERS),
                2 * tile,
                scales_ptr,
                zeros_ptr,
                sums_ptr,
                rm,
                live,
                rn,
                N_PAD,
                SUMS,
                ZEROS,
            )
            acc += scaled(
                exact(w1, x1, NUMBERS),
                2 * tile + 1,
                scales_ptr,
                zeros_ptr,
                sums_ptr,
                rm,
                live,
                rn,
                N_PAD,
                SUMS,
                ZEROS,
            )
        else:
            w = in_order(nibbles, NB, KB, LAYOUT)
            x = tl.load(x_ptrs, mask=live[None, :], other=0.0)
            if GROUP > 0:
                # The sums are of a whole group, so one of its tiles subtracts them.
                opening = live & (tile % (GROUP // BK) == 0)
                acc += scaled(
                    exact(w, x, NUMBERS),
                    tile // (GROUP // BK),
                    scales_ptr,
                    zeros_ptr,
                    sums_ptr,
                    rm,
                    opening if GROUP > BK else live,
                    rn,
                    N_PAD,
                    SUMS,
                    ZEROS,
                )
            elif NUMBERS == "int8":
                acc = tl.dot(w, x, acc, out_dtype=tl.int32)
            else:
                acc += tl.dot(w, x)
        x_ptrs += step * BK
        words_ptrs += step * KB * 2048
    total = acc.to(tl.float32)
    if GROUP == 0:
        # The sums are of whole rows, so one part of a split subtracts them.
        here = live & (first == 0)
        total = scaled(total, 0, scales_ptr, zeros_ptr, sums_ptr, rm, here, rn, N_PAD, SUMS, ZEROS)
    return total


@triton.jit
def finished(
    acc, t_ptr, bias_ptr, rm, live, rn, N, part, UNIT, FIXED: tl.constexpr, BIAS: tl.constexpr
):
    """t_m / UNIT * acc, and the bias in the first part of a split."""
    t = tl.load(t_ptr + rm * (0 if FIXED else 1), mask=live, other=0.0)
    acc *= (t * (1.0 / UNIT))[None, :]
    if BIAS:
        b = tl.load(bias_ptr + rn, mask=(rn < N) & (part == 0), other=0.0)
        acc += b.to(tl.float32)[:, None]
    return acc
