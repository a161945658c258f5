// Numbers of 16 bits, without instructions for them, and tensors of numbers of one of three kinds.

#pragma once

#include "bits.h"

#include <cstdint>

namespace {

enum Kind : int64_t { F32, F16, BF16 };

INLINE int64_t size_of(Kind kind) { return kind == F32 ? 4 : 2; }

INLINE float from_half(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  return from_bits(sign | bits_of(from_bits(rest << 13) * 0x1p112f));
}

INLINE uint16_t to_half(float value) {
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000;
  const uint32_t size = bits & 0x7fffffff;
  if (size > 0x7f800000) return sign | 0x7e00;
  if (size >= 0x477ff000) return sign | 0x7c00;                                // rounds past 65504
  if (size < 0x38800000) return sign | (bits_of(from_bits(size) + 0.5f) & 0x7ff);  // subnormal: units of 2^-24
  return sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13);
}

INLINE uint16_t to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
}

// A number as it is read again.
INLINE float stored(float value, Kind kind) {
  if (kind == F16) return from_half(to_half(value));
  if (kind == BF16) return from_bits(uint32_t(to_bf16(value)) << 16);
  return value;
}

INLINE void store(void* data, int64_t at, float value, Kind kind) {
  if (kind == F32) static_cast<float*>(data)[at] = value;
  else static_cast<uint16_t*>(data)[at] = kind == F16 ? to_half(value) : to_bf16(value);
}

INLINE float number(const void* data, int64_t at, Kind kind) {
  if (kind == F32) return static_cast<const float*>(data)[at];
  const uint16_t half = static_cast<const uint16_t*>(data)[at];
  return kind == F16 ? from_half(half) : from_bits(uint32_t(half) << 16);
}

// The distance of 1 to the next number.
INLINE float epsilon(Kind kind) { return kind == F32 ? 0x1p-23f : kind == F16 ? 0x1p-10f : 0x1p-7f; }

}  // namespace
