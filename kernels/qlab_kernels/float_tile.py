"""Device functions of the kernels for 4- and 8-bit floats: packed words to weights in registers,
and the loop along k.

A code becomes a 16-bit float by moving bits: its exponent lies below that of the wide format, and
what the two biases differ by is a power of two. In fp16 the number that arises is q 2^-DROP, and in
bf16 q 2^-DROP 2^-112, also where e2m1 and e4m3 are subnormal. The byte of a scale stands for v
there, and here for v 2^112, so that both products are q v 2^-DROP; the factor of the row has 2^DROP
in it. A product is exact: 2 or 4 bits of mantissa times 4 are at most 8.

SEQUENCE "plain" is the path without assembly, which Triton's interpreter runs and which is the
oracle of the others. COMPUTE is the dtype of the products' operands: that of x, but float32 for
bfloat16 in the interpreter, whose bfloat16 arithmetic is wrong.
"""

import triton
import triton.language as tl

from qlab_kernels.tile import group_rows, in_order

_FOUR = tl.constexpr("=r,=r,=r,=r,r")
_TWO = tl.constexpr("=r,=r,r")
# A word of eight e2m1 in the order of `float_layout`, as bf16: a sign at bit 15 of a lane, exponent
# and mantissa at bits 8 to 6. Moved by 0, 3 and 6 bits the first three values of a lane are there;
# the fourth is put together from three pieces (a & b | c is table 0xEA).
_E2M1_BF16 = tl.constexpr("""{
    .reg .b32 second, third, sign, high, low;
    shl.b32 second, $4, 3;
    shl.b32 third, $4, 6;
    shl.b32 sign, $4, 1;
    shr.u32 high, $4, 5;
    shr.u32 low, $4, 4;
    and.b32 $0, $4, 0x81C081C0;
    and.b32 $1, second, 0x81C081C0;
    and.b32 $2, third, 0x81C081C0;
    and.b32 sign, sign, 0x80008000;
    lop3.b32 sign, high, 0x01000100, sign, 0xEA;
    lop3.b32 $3, low, 0x00C000C0, sign, 0xEA;
}""")
# As fp16, whose exponent and mantissa lie 3 bits higher.
_E2M1_FP16 = tl.constexpr("""{
    .reg .b32 by3, by6, by9, sign, high, low;
    shl.b32 by3, $4, 3;
    shl.b32 by6, $4, 6;
    shl.b32 by9, $4, 9;
    shl.b32 sign, $4, 1;
    shr.u32 high, $4, 2;
    shr.u32 low, $4, 1;
    and.b32 $0, $4, 0x80008000;
    lop3.b32 $0, by3, 0x0E000E00, $0, 0xEA;
    and.b32 $1, by3, 0x80008000;
    lop3.b32 $1, by6, 0x0E000E00, $1, 0xEA;
    and.b32 $2, by6, 0x80008000;
    lop3.b32 $2, by9, 0x0E000E00, $2, 0xEA;
    and.b32 sign, sign, 0x80008000;
    lop3.b32 sign, high, 0x08000800, sign, 0xEA;
    lop3.b32 $3, low, 0x06000600, sign, 0xEA;
}""")
# A word of four e4m3, two in the lower bytes of its lanes and two in the upper ones.
_E4M3_BF16 = tl.constexpr("""{
    .reg .b32 sign, low, high;
    shl.b32 sign, $2, 8;
    shl.b32 low, $2, 4;
    shr.u32 high, $2, 4;
    and.b32 sign, sign, 0x80008000;
    lop3.b32 $0, low, 0x07F007F0, sign, 0xEA;
    and.b32 sign, $2, 0x80008000;
    lop3.b32 $1, high, 0x07F007F0, sign, 0xEA;
}""")
_E4M3_FP16 = tl.constexpr("""{
    .reg .b32 sign, low, high;
    shl.b32 sign, $2, 8;
    shl.b32 low, $2, 7;
    shr.u32 high, $2, 1;
    and.b32 sign, sign, 0x80008000;
    lop3.b32 $0, low, 0x3F803F80, sign, 0xEA;
    and.b32 sign, $2, 0x80008000;
    lop3.b32 $1, high, 0x3F803F80, sign, 0xEA;
}""")
LIFT = tl.constexpr(2.0**112)  # what bf16's exponents differ by from fp16's


@triton.jit
def as_half(bits, COMPUTE: tl.constexpr):
    """Bits of an fp16 below 2 in int32, sign included, as a number of COMPUTE: the same in fp16,
    and 2^-112 of it in bf16 and fp32."""
    sign = bits & 0x8000
    rest = bits & 0x7FFF
    if COMPUTE == tl.float16:  # noqa: SIM300
        x = bits.to(tl.int16).to(tl.float16, bitcast=True)
    elif COMPUTE == tl.bfloat16:  # noqa: SIM300
        x = (sign | rest >> 3).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        x = (sign << 16 | rest << 13).to(tl.float32, bitcast=True)
    return x


@triton.jit
def e2m1(words, SEQUENCE: tl.constexpr, COMPUTE: tl.constexpr):
    """uint8 [R, C] -> q 2^-14 in fp16, q 2^-126 in bf16 and fp32, [R, 2C], in the order of the
    values in each 32-bit word."""
    R: tl.constexpr = words.shape[0]
    C: tl.constexpr = words.shape[1]
    if SEQUENCE == "plain":
        # bytes: half of a lane, lane -> lane, half
        halves = words.to(tl.int32).reshape(R, C // 4, 2, 2)
        lower, upper = tl.split(halves)
        lane = lower | upper << 8
        first = (lane & 0x8000) | (lane & 0x01C0) << 3
        second = (lane & 0x1000) << 3 | (lane & 0x0038) << 6
        third = (lane & 0x0200) << 6 | (lane & 0x0007) << 9
        fourth = (lane & 0x4000) << 1 | (lane & 0x2000) >> 2 | (lane & 0x0C00) >> 1
        # lane p, i1, i0 -> i1, i0, p
        bits = tl.join(tl.join(first, third), tl.join(second, fourth)).trans(0, 1, 3, 4, 2)
        values = as_half(bits.reshape(R, C * 2), COMPUTE)
    else:
        if COMPUTE == tl.float16:  # noqa: SIM300
            low, high = tl.inline_asm_elementwise(
                _E2M1_FP16, _FOUR, [words], (tl.float16, tl.float16), True, 4
            )
        else:
            low, high = tl.inline_asm_elementwise(
                _E2M1_BF16, _FOUR, [words], (tl.bfloat16, tl.bfloat16), True, 4
            )
        values = tl.join(low, high).reshape(R, C // 4, 4, 2).trans(0, 1, 3, 2).reshape(R, C * 2)
    return values


@triton.jit
def e4m3(words, SEQUENCE: tl.constexpr, COMPUTE: tl.constexpr):
    """uint8 [R, C] -> q 2^-8 in fp16, q 2^-120 in bf16 and fp32, [R, C], in the order of the values
    in each 32-bit word."""
    R: tl.constexpr = words.shape[0]
    C: tl.constexpr = words.shape[1]
    if SEQUENCE == "plain":
        # lane, half -> half, lane
        octets = words.to(tl.int32).reshape(R, C // 4, 2, 2).trans(0, 1, 3, 2).reshape(R, C)
        values = as_half((octets & 0x80) << 8 | (octets & 0x7F) << 7, COMPUTE)
    elif COMPUTE == tl.float16:  # noqa: SIM300
        values = tl.inline_asm_elementwise(_E4M3_FP16, _TWO, [words], tl.float16, True, 4)
    else:
        values = tl.inline_asm_elementwise(_E4M3_BF16, _TWO, [words], tl.bfloat16, True, 4)
    return values


@triton.jit
def in_order_of_octets(values, NB: tl.constexpr, KB: tl.constexpr, LAYOUT: tl.constexpr):
    """[NB*KB, 4096] of e4m3 in the order of LAYOUT -> [64 NB, 64 KB] in the order of n and k; no
    data moves between threads."""
    if LAYOUT == "wgmma":  # nb kb a w g t b h r p -> nb w r g, kb a b h t p
        parts = values.reshape(NB, KB, 2, 4, 8, 4, 2, 2, 2, 2)
        ordered = parts.trans(0, 3, 8, 4, 1, 2, 6, 7, 5, 9)
    else:  # nb kb r w g t j e -> nb w r g, kb j t e
        ordered = values.reshape(NB, KB, 2, 4, 8, 4, 4, 4).trans(0, 3, 2, 4, 1, 6, 5, 7)
    return ordered.reshape(64 * NB, 64 * KB)


@triton.jit
def load_scales(
    scales_ptr, tile, rn, N_PAD, GROUP: tl.constexpr, BK: tl.constexpr, COMPUTE: tl.constexpr
):
    """The scales [BN, BK / GROUP] of a k tile, of bytes: v in fp16, v 2^112 in bf16 and fp32."""
    BN: tl.constexpr = rn.shape[0]
    GROUPS: tl.constexpr = BK // GROUP
    EACH: tl.constexpr = min(4, GROUPS)
    WORDS: tl.constexpr = GROUPS // EACH
    rows = (tile * GROUPS >> 2) + tl.arange(0, WORDS)
    words = tl.load(scales_ptr + rows[None, :] * N_PAD + rn[:, None])
    shifts = ((tile * GROUPS & 3) + tl.arange(0, EACH)) * 8
    b = (words[:, :, None] >> shifts[None, None, :]).reshape(BN, GROUPS)
    if COMPUTE == tl.float16:  # noqa: SIM300
        s = (b << 7 & 0x7F80).to(tl.int16).to(tl.float16, bitcast=True)
    elif COMPUTE == tl.bfloat16:  # noqa: SIM300
        s = (b << 4 & 0x0FF0 | 0x7000).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        s = (b << 20 & 0x0FF00000 | 0x70000000).to(tl.float32, bitcast=True)
    return s


@triton.jit
def float_product(
    x_rows,
    live,
    words_ptr,
    scales_ptr,
    factors_ptr,
    rn,
    K,
    N_PAD,
    first,
    step,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    LAYOUT: tl.constexpr,
    SEQUENCE: tl.constexpr,
    COMPUTE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """fp32 y.T[BN, BM] over the k tiles first, first + step, ...

    x_rows: pointers [BM] to rows of x, read where `live`. words_ptr: this block of n. scales_ptr:
    bytes in int32 [K / 4 GROUP, N_PAD] of groups up to 32, fp32 [K/GROUP, N_PAD] of wider ones;
    factors_ptr: fp32 [N_PAD]; rn: [BN] their columns. GROUP = 0: factors alone.
    """
    NB: tl.constexpr = BN // 64
    KB: tl.constexpr = BK // 64
    ATOM: tl.constexpr = 512 * BITS
    atoms = (
        tl.arange(0, NB)[:, None, None] * (K // 64 * ATOM) + tl.arange(0, KB)[None, :, None] * ATOM
    )
    words_ptrs = words_ptr + first * KB * ATOM + atoms + tl.arange(0, ATOM)[None, None, :]
    x_ptrs = x_rows[None, :] + first * BK + tl.arange(0, BK)[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    for tile in tl.range(first, K // BK, step, num_stages=STAGES):
        x = tl.load(x_ptrs, mask=live[None, :], other=0.0).to(COMPUTE)
        words = tl.load(words_ptrs, eviction_policy="evict_first").reshape(NB * KB, ATOM)
        if BITS == 4:
            w = in_order(e2m1(words, SEQUENCE, COMPUTE), NB, KB, LAYOUT)
        else:
            w = in_order_of_octets(e4m3(words, SEQUENCE, COMPUTE), NB, KB, LAYOUT)
        if GROUP > 0 and GROUP <= 32:
            s = load_scales(scales_ptr, tile, rn, N_PAD, GROUP, BK, COMPUTE)
            acc = tl.dot(w * group_rows(s, BK), x, acc)
        else:
            if COMPUTE != tl.float16:  # noqa: SIM300
                w = (w * LIFT).to(COMPUTE)
            if GROUP == 0:
                acc = tl.dot(w, x, acc)
            else:
                s = tl.load(scales_ptr + (tile // (GROUP // BK)) * N_PAD + rn)
                acc += tl.dot(w, x) * s[:, None]
        x_ptrs += step * BK
        words_ptrs += step * KB * ATOM
    return acc * tl.load(factors_ptr + rn)[:, None]
