// Keys or values of a cache as numbers, on a CPU: x [b, l, h, d] of the tokens in the slots at [b, l], from the codes that
// code_tokens.cpp writes.
//
//     x = (c - z) s                         with s and z of a token [slots, h or 1, groups], or of all [1, h or 1, groups]
//
// It is fp32, and no product is fused with a sum, as in torch; then it is rounded to the dtype of x.

#include "arguments.h"
#include "halves.h"
#include "paths.h"

#include <algorithm>
#include <cstdint>

namespace {

constexpr int64_t GRAIN = 1 << 14;         // numbers below which another thread costs more than it gains

struct Problem {                           // all tensors contiguous
  const uint8_t* codes;                    // [slots, h, width]
  const void* scales;
  const int8_t* zeros;                     // or null
  const int64_t* at;                       // [b * l]
  void* x;                                 // [b * l, h, d]
  Kind scale_kind;
  int64_t heads, width, d, group, half;    // group: channels under a scale; half: codes in the low bits of pairs
  int64_t of_token, of_head;               // strides of scales and zeros, 0 where they are those of all
  bool is_float;
};

INLINE float integer(uint8_t code) { return float(int8_t(code)); }
INLINE float low(uint8_t pair) { return float(int32_t(pair & 15) - 8); }
INLINE float high(uint8_t pair) { return float(int32_t(pair >> 4) - 8); }

// e4m3: its bits under the exponents of a float are 2^-120 of it.
INLINE float e4m3(uint8_t code) {
  const uint32_t size = code & 0x7f, sign = uint32_t(code & 0x80) << 24;
  const float value = from_bits(size << 20) * 0x1p120f;
  return from_bits((size == 0x7f ? 0x7fc00000 : bits_of(value)) | sign);
}

INLINE void put(float* x, float value) { *x = value; }
INLINE void put(uint16_t* x, float value) { *x = to_bf16(value); }

template <float NUMBER(uint8_t), class T>
INLINE void scaled(const uint8_t* codes, int64_t count, float zero, float scale, T* x) {
  for (int64_t i = 0; i < count; i++) put(x + i, (NUMBER(codes[i]) - zero) * scale);
}

// Channels first..last of a head.
template <class T>
INLINE void read(const Problem& p, const uint8_t* codes, int64_t first, int64_t last, float zero, float scale, T* x) {
  if (p.is_float) {
    scaled<e4m3>(codes + first, last - first, zero, scale, x + first);
  } else if (p.half == 0) {
    scaled<integer>(codes + first, last - first, zero, scale, x + first);
  } else {
    const int64_t end = std::min(last, p.half), start = std::max(first, p.half);
    scaled<low>(codes + first, end - first, zero, scale, x + first);
    scaled<high>(codes + start - p.half, last - start, zero, scale, x + start);
  }
}

template <class T>
INLINE void run(int64_t first, int64_t last, void* made) {
  const Problem& p = *static_cast<const Problem*>(made);
  for (int64_t token = first; token < last; token++) {
    for (int64_t h = 0; h < p.heads; h++) {
      const uint8_t* codes = p.codes + (p.at[token] * p.heads + h) * p.width;
      const int64_t own = p.at[token] * p.of_token + h * p.of_head;
      T* x = static_cast<T*>(p.x) + (token * p.heads + h) * p.d;
      for (int64_t g = 0; g * p.group < p.d; g++) {
        const float zero = p.zeros ? p.zeros[own + g] : 0, scale = number(p.scales, own + g, p.scale_kind);
        read(p, codes, g * p.group, (g + 1) * p.group, zero, scale, x);
      }
    }
  }
}

template <class T>
struct Runs {
  static void portable(int64_t first, int64_t last, void* p) { run<T>(first, last, p); }
  AVX2 static void avx2(int64_t first, int64_t last, void* p) { run<T>(first, last, p); }
  AVX512 static void avx512(int64_t first, int64_t last, void* p) { run<T>(first, last, p); }

  static void call(int64_t path, int64_t tokens, int64_t grain, Problem* p) {
    const auto chosen = path == PATH_AVX512 ? avx512 : path == PATH_AVX2 ? avx2 : portable;
    torch_parallel_for(0, tokens, grain, chosen, p);
  }
};

// read_tokens_of_cpu(Tensor codes, Tensor scales, Tensor zeros, Tensor at, int channels, int is_float, int is_half, int path)
// -> Tensor: all contiguous, zeros empty where there are none, is_half where x is bfloat16.
void boxed_read_tokens(StableIValue* stack, uint64_t, uint64_t) {
  const Argument codes(stack[0]), scales(stack[1]), zeros(stack[2]), at(stack[3]);
  const bool is_half = int64_t(stack[6]);
  const int64_t path = std::min(int64_t(stack[7]) ? int64_t(stack[7]) : qlab_best_path(), qlab_best_path());
  const int64_t b = at.size(0), l = at.size(1), rows = scales.size(1), groups = scales.size(2);
  Problem p{};
  p.codes = reinterpret_cast<const uint8_t*>(codes.data());
  p.scales = scales.data(), p.scale_kind = kind_of(scales);
  p.zeros = zeros.size(0) ? reinterpret_cast<const int8_t*>(zeros.data()) : nullptr;
  p.at = reinterpret_cast<const int64_t*>(at.data());
  p.heads = codes.size(1), p.width = codes.size(2), p.d = int64_t(stack[4]), p.group = p.d / groups;
  p.is_float = int64_t(stack[5]);
  p.half = codes.dtype() == aoti_torch_dtype_uint8() && !p.is_float ? p.width : 0;
  p.of_token = scales.size(0) == 1 ? 0 : rows * groups, p.of_head = rows == 1 ? 0 : groups;
  AtenTensorHandle x = empty({b, l, p.heads, p.d}, is_half ? aoti_torch_dtype_bfloat16() : aoti_torch_dtype_float32());
  p.x = data_of(x);
  const int64_t grain = std::max<int64_t>(1, GRAIN / (p.heads * p.d));
  if (is_half) Runs<uint16_t>::call(path, b * l, grain, &p);
  else Runs<float>::call(path, b * l, grain, &p);
  stack[0] = value_of(x);
}

}  // namespace

extern "C" int32_t qlab_register() { return given_to_torch({{"read_tokens_of_cpu", boxed_read_tokens}}); }
