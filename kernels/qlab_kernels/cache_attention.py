"""Attention of few query tokens over keys and values that a cache holds as 8- or 4-bit codes.

    p = softmax(scale q . k + mask),  y = sum p v,  k = (c - z) s,  v likewise

A program reads a part of the positions of one sequence and one head of keys and values, for all
query heads that share it, and keeps the largest score, the sum of weights and the weighted sum of
values in fp32. A second kernel adds the parts in their order, so that results do not depend on
which program ends first. Scales of a token multiply scores and weights, and zero points become sums
over queries and over weights, so that no number of the cache is scaled by itself; only where
channels of a head have scales of their own it is.
Sources: Dao et al. 2023 (flash-decoding); Milakov and Gimelshein 2018 (online softmax).
"""

import triton
import triton.language as tl


@triton.jit
def octets(raw, FORMAT: tl.constexpr, COMPUTE: tl.constexpr):
    """Codes of 8 bits in COMPUTE, as `formats.decoding` says: v = unit * (code + offset).

    int8 in float16: under the exponent of 1024. fp8 (e4m3): its bits are those of a float16 with a
    longer mantissa, which is 2^-8 of it.
    """
    if FORMAT == "fp8":
        bits = raw.to(tl.uint8, bitcast=True).to(tl.uint16)
        half = (((bits & 128) << 8) | ((bits & 127) << 7)).to(tl.float16, bitcast=True)
        values = half if tl.float16 == COMPUTE else half.to(tl.float32).to(COMPUTE)
    elif tl.float16 == COMPUTE:
        shifted = (raw.to(tl.uint8, bitcast=True) ^ 128).to(tl.uint16)
        values = (shifted | 0x6400).to(tl.float16, bitcast=True)
    elif tl.bfloat16 == COMPUTE:
        # under the exponent of 2^23 in float32, less 2^23 + 128: no integer is converted
        shifted = (raw.to(tl.uint8, bitcast=True) ^ 128).to(tl.uint32)
        values = ((shifted | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0).to(COMPUTE)
    else:
        values = raw.to(COMPUTE)
    return values


@triton.jit
def nibbles(raw, HIGH: tl.constexpr, COMPUTE: tl.constexpr):
    """One of the two codes of 4 bits of every byte in COMPUTE: under the exponent of 128 in
    bfloat16 and of 1024 in float16, so that no integer is converted."""
    bits = (
        raw.to(tl.uint8, bitcast=True) >> 4 if HIGH else raw.to(tl.uint8, bitcast=True) & 15
    ).to(tl.uint16)
    if tl.bfloat16 == COMPUTE:
        values = (bits | 0x4300).to(tl.bfloat16, bitcast=True)
    elif tl.float16 == COMPUTE:
        values = (bits | 0x6400).to(tl.float16, bitcast=True)
    else:
        values = bits.to(COMPUTE)
    return values


@triton.jit
def scaled(
    values,
    scales_ptr,
    zeros_ptr,
    at,
    channel,
    mask,
    OFFSET: tl.constexpr,
    UNIT: tl.constexpr,
    ZEROS: tl.constexpr,
    GROUP: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Codes of channels with scales of their own -> numbers, rounded to COMPUTE."""
    place = at + channel // GROUP
    zero = OFFSET
    if ZEROS:
        zero = tl.load(zeros_ptr + place, mask=mask, other=0.0).to(tl.float32) + OFFSET
    step = tl.load(scales_ptr + place, mask=mask, other=0.0)
    return ((values.to(tl.float32) - zero) * (step * UNIT)).to(COMPUTE)


@triton.jit(do_not_specialize=["H", "T", "R", "PAGES_STRIDE"])
def cache_attention_kernel(
    q_ptr,
    k_ptr,
    k_scales_ptr,
    k_zeros_ptr,
    v_ptr,
    v_scales_ptr,
    v_zeros_ptr,
    lengths_ptr,
    starts_ptr,
    pages_ptr,
    sums_ptr,
    tops_ptr,
    totals_ptr,
    scale,
    cap,
    window,
    H,
    T,
    R,
    PAGES_STRIDE,
    K_B,
    K_H,
    K_N,
    KS_B,
    KS_H,
    KS_N,
    V_B,
    V_H,
    V_N,
    VS_B,
    VS_H,
    VS_N,
    D: tl.constexpr,
    DV: tl.constexpr,
    K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    K_PADDED: tl.constexpr,
    V_PADDED: tl.constexpr,
    K_FORMAT: tl.constexpr,
    V_FORMAT: tl.constexpr,
    K_OFFSET: tl.constexpr,
    V_OFFSET: tl.constexpr,
    K_UNIT: tl.constexpr,
    V_UNIT: tl.constexpr,
    K_GROUP: tl.constexpr,
    V_GROUP: tl.constexpr,
    K_ZEROS: tl.constexpr,
    V_ZEROS: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    STARTED: tl.constexpr,
    PAGE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (sequences x heads of keys, tiles of query rows, splits).

    q [B, H, R, D], with T query tokens for each of the R // T heads that share keys. Codes [B or
    pages, H, positions, K_WIDTH bytes] by strides, of which 4-bit ones hold channel j and channel
    j + K_WIDTH in byte j. Scales and zeros [.., .., .., groups] by strides that may be 0. lengths
    [B], starts [B]: positions from the start to the length exist, and the last T of them are the
    queries' own. sums [B * H, splits, R, DV], tops and totals [B * H, splits, R] in fp32.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    K_HALVES: tl.constexpr = K_FORMAT == "int4"
    V_HALVES: tl.constexpr = V_FORMAT == "int4"
    # scaled numbers have their unit already
    K_FACTOR: tl.constexpr = 1.0 if K_GROUP > 0 else K_UNIT
    V_FACTOR: tl.constexpr = 1.0 if V_GROUP > 0 else V_UNIT
    b = tl.program_id(0) // H
    h = tl.program_id(0) % H
    split, splits = tl.program_id(2), tl.num_programs(2)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    live = (rows < R)[:, None]
    dk = tl.arange(0, K_PADDED)
    dv = tl.arange(0, V_PADDED)
    q_ptrs = q_ptr + tl.program_id(0).to(tl.int64) * R * D + rows[:, None] * D + dk[None, :]
    inside = (dk < K_WIDTH) & (dk < D)
    q = tl.load(q_ptrs, mask=live & inside[None, :], other=0.0).to(COMPUTE)
    q_total = tl.sum(q.to(tl.float32), 1)
    q_high = q
    if K_HALVES:
        above = (dk < K_WIDTH) & (dk + K_WIDTH < D)
        q_high = tl.load(q_ptrs + K_WIDTH, mask=live & above[None, :], other=0.0).to(COMPUTE)
        q_total += tl.sum(q_high.to(tl.float32), 1)

    length = tl.load(lengths_ptr + b)
    own = length - T + rows % T
    begin = 0
    if STARTED:
        begin = tl.load(starts_ptr + b)
    earliest = begin
    if WINDOWED:
        begin = tl.maximum(begin, length - T - window + 1)
    share = tl.cdiv(tl.cdiv(tl.maximum(length - begin, 0), BN), splits) * BN
    first = begin + split * share
    last = tl.minimum(first + share, length)

    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    moved = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, V_PADDED), tl.float32)
    acc_high = tl.zeros((BM, V_PADDED if V_HALVES else 1), tl.float32)
    for start in tl.range(first, last, BN, num_stages=STAGES):
        n = start + tl.arange(0, BN)
        there = n < last
        block = b
        slot = n
        if PAGE > 0:
            page_ptrs = pages_ptr + b.to(tl.int64) * PAGES_STRIDE + n // PAGE
            block = tl.load(page_ptrs, mask=there, other=0)
            slot = n % PAGE
        k_at = block.to(tl.int64) * K_B + h * K_H + slot * K_N
        ks_at = block.to(tl.int64) * KS_B + h * KS_H + slot * KS_N
        v_at = block.to(tl.int64) * V_B + h * V_H + slot * V_N
        vs_at = block.to(tl.int64) * VS_B + h * VS_H + slot * VS_N

        k_mask = (dk < K_WIDTH)[:, None] & there[None, :]
        k_raw = tl.load(k_ptr + k_at[None, :] + dk[:, None], mask=k_mask, other=0)
        if K_HALVES:
            k = nibbles(k_raw, False, COMPUTE)
            k_high = nibbles(k_raw, True, COMPUTE)
            if K_GROUP > 0:
                at = ks_at[None, :]
                k = scaled(
                    k,
                    k_scales_ptr,
                    k_zeros_ptr,
                    at,
                    dk[:, None],
                    k_mask & (dk < D)[:, None],
                    K_OFFSET,
                    K_UNIT,
                    K_ZEROS,
                    K_GROUP,
                    COMPUTE,
                )
                k_above = k_mask & (dk + K_WIDTH < D)[:, None]
                k_high = scaled(
                    k_high,
                    k_scales_ptr,
                    k_zeros_ptr,
                    at,
                    dk[:, None] + K_WIDTH,
                    k_above,
                    K_OFFSET,
                    K_UNIT,
                    K_ZEROS,
                    K_GROUP,
                    COMPUTE,
                )
            s = tl.dot(q_high, k_high, tl.dot(q, k))
        else:
            k = octets(k_raw, K_FORMAT, COMPUTE)
            if K_GROUP > 0:
                k = scaled(
                    k,
                    k_scales_ptr,
                    k_zeros_ptr,
                    ks_at[None, :],
                    dk[:, None],
                    k_mask,
                    K_OFFSET,
                    K_UNIT,
                    K_ZEROS,
                    K_GROUP,
                    COMPUTE,
                )
            s = tl.dot(q, k)
        if K_GROUP == 0:
            k_zero = tl.full((BN,), K_OFFSET, tl.float32)
            if K_ZEROS:
                k_zero += tl.load(k_zeros_ptr + ks_at, mask=there, other=0.0).to(tl.float32)
            if K_ZEROS or K_OFFSET != 0:
                s -= q_total[:, None] * k_zero[None, :]
            s *= tl.load(k_scales_ptr + ks_at, mask=there, other=0.0)[None, :]
        s *= scale * K_FACTOR
        if CAPPED:
            s = cap * (1 - 2 / (tl.exp2(s * (2 * LOG2E / cap)) + 1))
        s *= LOG2E
        seen = there[None, :] & (n[None, :] <= own[:, None])
        if WINDOWED:
            seen &= n[None, :] > own[:, None] - window
        if STARTED:
            seen &= n[None, :] >= earliest
        s = tl.where(seen, s, float("-inf"))

        higher = tl.maximum(top, tl.max(s, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s - finite[:, None])
        fading = tl.exp2(top - finite)
        total = total * fading + tl.sum(p, 1)
        top = higher

        v_mask = there[:, None] & (dv < V_WIDTH)[None, :]
        v_raw = tl.load(v_ptr + v_at[:, None] + dv[None, :], mask=v_mask, other=0)
        largest = 1.0
        if V_GROUP == 0:
            step = tl.load(v_scales_ptr + vs_at, mask=there, other=0.0)
            if tl.float16 == COMPUTE:
                # weights times small scales would lose their last bits in float16
                largest = tl.max(tl.abs(step), 0)
                step = step / tl.where(largest > 0, largest, 1.0)
            p *= step[None, :]
        w = p.to(COMPUTE)
        if V_GROUP == 0 and (V_ZEROS or V_OFFSET != 0):
            v_zero = tl.full((BN,), V_OFFSET, tl.float32)
            if V_ZEROS:
                v_zero += tl.load(v_zeros_ptr + vs_at, mask=there, other=0.0).to(tl.float32)
            moved = moved * fading + tl.sum(w.to(tl.float32) * v_zero[None, :], 1) * largest
        acc *= fading[:, None]
        if V_HALVES:
            v = nibbles(v_raw, False, COMPUTE)
            v_high = nibbles(v_raw, True, COMPUTE)
            if V_GROUP > 0:
                at = vs_at[:, None]
                v = scaled(
                    v,
                    v_scales_ptr,
                    v_zeros_ptr,
                    at,
                    dv[None, :],
                    v_mask & (dv < DV)[None, :],
                    V_OFFSET,
                    V_UNIT,
                    V_ZEROS,
                    V_GROUP,
                    COMPUTE,
                )
                v_above = v_mask & (dv + V_WIDTH < DV)[None, :]
                v_high = scaled(
                    v_high,
                    v_scales_ptr,
                    v_zeros_ptr,
                    at,
                    dv[None, :] + V_WIDTH,
                    v_above,
                    V_OFFSET,
                    V_UNIT,
                    V_ZEROS,
                    V_GROUP,
                    COMPUTE,
                )
            acc_high = acc_high * fading[:, None] + tl.dot(w, v_high) * largest
        else:
            v = octets(v_raw, V_FORMAT, COMPUTE)
            if V_GROUP > 0:
                v = scaled(
                    v,
                    v_scales_ptr,
                    v_zeros_ptr,
                    vs_at[:, None],
                    dv[None, :],
                    v_mask,
                    V_OFFSET,
                    V_UNIT,
                    V_ZEROS,
                    V_GROUP,
                    COMPUTE,
                )
        acc += tl.dot(w, v) * largest

    part = tl.program_id(0).to(tl.int64) * splits + split
    at = part * R + rows
    tl.store(tops_ptr + at, top, mask=rows < R)
    tl.store(totals_ptr + at, total, mask=rows < R)
    y_ptrs = sums_ptr + at[:, None] * DV + dv[None, :]
    y = (acc - moved[:, None]) * V_FACTOR
    tl.store(y_ptrs, y, mask=live & ((dv < V_WIDTH) & (dv < DV))[None, :])
    if V_HALVES:
        y_high = (acc_high - moved[:, None]) * V_FACTOR
        tl.store(
            y_ptrs + V_WIDTH, y_high, mask=live & ((dv < V_WIDTH) & (dv + V_WIDTH < DV))[None, :]
        )


@triton.jit(do_not_specialize=["R", "SPLITS"])
def combine_kernel(
    sums_ptr,
    tops_ptr,
    totals_ptr,
    y_ptr,
    R,
    SPLITS,
    DV: tl.constexpr,
    PADDED: tl.constexpr,
    MOST: tl.constexpr,
):
    """Grid (sequences x heads of keys, rows): the parts of a row, added in their order. A row that
    sees no position is 0."""
    row = tl.program_id(1)
    first = tl.program_id(0).to(tl.int64) * SPLITS * R + row
    i = tl.arange(0, MOST)
    tops = tl.load(tops_ptr + first + i * R, mask=i < SPLITS, other=float("-inf"))
    top = tl.max(tops, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    d = tl.arange(0, PADDED)
    y = tl.zeros((PADDED,), tl.float32)
    total = 0.0
    for split in range(SPLITS):
        at = first + split * R
        weight = tl.exp2(tl.load(tops_ptr + at) - top)
        total += weight * tl.load(totals_ptr + at)
        y += weight * tl.load(sums_ptr + at * DV + d, mask=d < DV, other=0.0)
    y = tl.where(total > 0, y / total, 0.0)
    y_ptrs = y_ptr + (tl.program_id(0).to(tl.int64) * R + row) * DV + d
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=d < DV)
