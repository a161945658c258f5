"""Device functions of the tensor-core kernels: packed words to weights in registers, and the loop
along k.

Weights are the left operand, y.T[bn, bm] = W[bn, bk] @ x.T[bk, bm]: wgmma takes only its left
operand from registers. SEQUENCE names how 16-bit codes are made: "sub" and "fma" by magic numbers
in assembly (see `codes`), "plain" without assembly, which Triton's interpreter runs and which is
the oracle of the others. COMPUTE is the dtype of the products' operands: that of x, but float32 for
bfloat16 in the interpreter, whose bfloat16 arithmetic is wrong.
"""

import triton
import triton.language as tl

_REGISTERS = tl.constexpr("=r,=r,=r,=r,r")
# One 32-bit word of eight nibbles q to eight 16-bit q - 8. A nibble under the exponent of 2**m
# reads 2**m + q: bf16 0x4300 | q is 128 + q, fp16 0x6400 | q is 1024 + q, and fp16 0x6400 | q << 4
# is 1024 + 16 q. One lop3 (a & b | c is table 0xEA) makes two of them, and one subtraction or fma
# takes the magic number and 8 away, exactly. `sub.bf16x2` needs 9.0; 8.x has `fma.rn.bf16x2`.
_FP16 = tl.constexpr("""{
    .reg .b32 upper, exponent, m1032, sixteenth, m72;
    mov.b32 exponent, 0x64006400;
    mov.b32 m1032, 0x64086408;
    mov.b32 sixteenth, 0x2C002C00;
    mov.b32 m72, 0xD480D480;
    shr.u32 upper, $4, 8;
    lop3.b32 $0, $4, 0x000F000F, exponent, 0xEA;
    lop3.b32 $1, $4, 0x00F000F0, exponent, 0xEA;
    lop3.b32 $2, upper, 0x000F000F, exponent, 0xEA;
    lop3.b32 $3, upper, 0x00F000F0, exponent, 0xEA;
    sub.f16x2 $0, $0, m1032;
    fma.rn.f16x2 $1, $1, sixteenth, m72;
    sub.f16x2 $2, $2, m1032;
    fma.rn.f16x2 $3, $3, sixteenth, m72;
}""")
_BF16_SUB = tl.constexpr("""{
    .reg .b32 s4, s8, s12, m136;
    mov.b32 m136, 0x43084308;
    shr.u32 s4, $4, 4;
    shr.u32 s8, $4, 8;
    shr.u32 s12, $4, 12;
    lop3.b32 $0, $4, 0x000F000F, 0x43004300, 0xEA;
    lop3.b32 $1, s4, 0x000F000F, 0x43004300, 0xEA;
    lop3.b32 $2, s8, 0x000F000F, 0x43004300, 0xEA;
    lop3.b32 $3, s12, 0x000F000F, 0x43004300, 0xEA;
    sub.bf16x2 $0, $0, m136;
    sub.bf16x2 $1, $1, m136;
    sub.bf16x2 $2, $2, m136;
    sub.bf16x2 $3, $3, m136;
}""")
_BF16_FMA = tl.constexpr("""{
    .reg .b32 s4, s8, s12, one, m136;
    mov.b32 one, 0x3F803F80;
    mov.b32 m136, 0xC308C308;
    shr.u32 s4, $4, 4;
    shr.u32 s8, $4, 8;
    shr.u32 s12, $4, 12;
    lop3.b32 $0, $4, 0x000F000F, 0x43004300, 0xEA;
    lop3.b32 $1, s4, 0x000F000F, 0x43004300, 0xEA;
    lop3.b32 $2, s8, 0x000F000F, 0x43004300, 0xEA;
    lop3.b32 $3, s12, 0x000F000F, 0x43004300, 0xEA;
    fma.rn.bf16x2 $0, $0, one, m136;
    fma.rn.bf16x2 $1, $1, one, m136;
    fma.rn.bf16x2 $2, $2, one, m136;
    fma.rn.bf16x2 $3, $3, one, m136;
}""")


@triton.jit
def codes(words, SEQUENCE: tl.constexpr, COMPUTE: tl.constexpr):
    """uint8 [R, C] -> codes -8..7 in COMPUTE [R, 2C], nibbles in the order e of each 32-bit
    word."""
    R: tl.constexpr = words.shape[0]
    C: tl.constexpr = words.shape[1]
    if SEQUENCE == "plain":
        low = (words & 15).to(tl.int8)
        high = (words >> 4).to(tl.int8)
        # p, i1, i0 -> i1, i0, p
        nibbles = tl.join(low, high).reshape(R, C // 4, 2, 2, 2).trans(0, 1, 3, 4, 2)
        values = (nibbles.reshape(R, C * 2) - 8).to(COMPUTE)
    else:
        if COMPUTE == tl.float16:  # noqa: SIM300
            first, second = tl.inline_asm_elementwise(
                _FP16, _REGISTERS, [words], (tl.float16, tl.float16), True, 4
            )
        elif SEQUENCE == "sub":
            first, second = tl.inline_asm_elementwise(
                _BF16_SUB, _REGISTERS, [words], (tl.bfloat16, tl.bfloat16), True, 4
            )
        else:
            first, second = tl.inline_asm_elementwise(
                _BF16_FMA, _REGISTERS, [words], (tl.bfloat16, tl.bfloat16), True, 4
            )
        halves = tl.join(first, second).reshape(R, C // 4, 4, 2).trans(0, 1, 3, 2)
        values = halves.reshape(R, C * 2)
    return values


@triton.jit
def in_order(nibbles, NB: tl.constexpr, KB: tl.constexpr, LAYOUT: tl.constexpr):
    """[NB*KB, 4096] in the nibble order of LAYOUT -> [64 NB, 64 KB] in the order of n and k; no
    data moves between threads."""
    if LAYOUT == "wgmma":  # nb kb w g t j h r p -> nb w r g, kb j h t p
        ordered = nibbles.reshape(NB, KB, 4, 8, 4, 4, 2, 2, 2).trans(0, 2, 7, 3, 1, 5, 6, 4, 8)
    else:  # nb kb w g t r j e -> nb w r g, kb j t e
        ordered = nibbles.reshape(NB, KB, 4, 8, 4, 2, 2, 8).trans(0, 2, 5, 3, 1, 6, 4, 7)
    return ordered.reshape(64 * NB, 64 * KB)


@triton.jit
def load_halves(ptr, row, rn, N_PAD, DTYPE: tl.constexpr):
    """16-bit values [row, rn] by way of int32 loads: narrower ones are not pipelined, and their
    latency would show in every step."""
    word = tl.load(ptr + (row * (N_PAD >> 1) + (rn >> 1)))
    return (word >> ((rn & 1) * 16)).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def group_rows(values, BK: tl.constexpr):
    """[BN, groups] -> [BN, BK]: each group's value for each of its k."""
    BN: tl.constexpr = values.shape[0]
    GROUPS: tl.constexpr = values.shape[1]
    return values[:, :, None].broadcast_to(BN, GROUPS, BK // GROUPS).reshape(BN, BK)


@triton.jit
def product(
    x_rows,
    live,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    rn,
    K,
    N_PAD,
    first,
    step,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SCALE_ON: tl.constexpr,
    LAYOUT: tl.constexpr,
    SEQUENCE: tl.constexpr,
    COMPUTE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """fp32 y.T[BN, BM] over the k tiles first, first + step, ...

    x_rows: pointers [BM] to rows of x, read where `live`. words_ptr: this block of n. scales_ptr,
    zeros_ptr: pairs of 16-bit values as int32 [K/GROUP, N_PAD]; rn: [BN] their columns. GROUP = 0:
    one scale per row. Zero points are taken from the 16-bit codes, which is exact for integers.
    """
    NB: tl.constexpr = BN // 64
    KB: tl.constexpr = BK // 64
    DTYPE: tl.constexpr = x_rows.dtype.element_ty
    GROUPS: tl.constexpr = BK // GROUP if GROUP > 0 and GROUP < BK else 1
    atoms = (
        tl.arange(0, NB)[:, None, None] * (K // 64 * 2048) + tl.arange(0, KB)[None, :, None] * 2048
    )
    words_ptrs = words_ptr + first * KB * 2048 + atoms + tl.arange(0, 2048)[None, None, :]
    x_ptrs = x_rows[None, :] + first * BK + tl.arange(0, BK)[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    if ZEROS and GROUP == 0:
        z = load_halves(zeros_ptr, 0, rn, N_PAD, DTYPE).to(COMPUTE)[:, None]
    for tile in tl.range(first, K // BK, step, num_stages=STAGES):
        x = tl.load(x_ptrs, mask=live[None, :], other=0.0).to(COMPUTE)
        words = tl.load(words_ptrs, eviction_policy="evict_first").reshape(NB * KB, 2048)
        w = in_order(codes(words, SEQUENCE, COMPUTE), NB, KB, LAYOUT)
        if GROUP == 0:
            acc = tl.dot(w - z if ZEROS else w, x, acc)
        elif GROUPS > 1:
            rows = tile * GROUPS + tl.arange(0, GROUPS)[None, :]
            if ZEROS:
                w -= group_rows(load_halves(zeros_ptr, rows, rn[:, None], N_PAD, DTYPE), BK).to(
                    COMPUTE
                )
            w *= group_rows(load_halves(scales_ptr, rows, rn[:, None], N_PAD, DTYPE), BK).to(
                COMPUTE
            )
            acc = tl.dot(w, x, acc)
        else:
            row = tile // (GROUP // BK)
            if ZEROS:
                w -= load_halves(zeros_ptr, row, rn, N_PAD, DTYPE).to(COMPUTE)[:, None]
            s = load_halves(scales_ptr, row, rn, N_PAD, DTYPE)
            if SCALE_ON == "weight":
                acc = tl.dot(w * s.to(COMPUTE)[:, None], x, acc)
            else:
                acc += tl.dot(w, x) * s.to(tl.float32)[:, None]
        x_ptrs += step * BK
        words_ptrs += step * KB * 2048
    if GROUP == 0:
        acc *= load_halves(scales_ptr, 0, rn, N_PAD, DTYPE).to(tl.float32)[:, None]
    return acc
