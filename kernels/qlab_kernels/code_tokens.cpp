// New keys or values of a cache as codes, on a CPU: x [n, k] of n tokens, whose k channels are those of h heads, in groups of
// channels that share a scale.
//
//     s = absmax / reach                    or (hi - lo) / (qmax - qmin), of the range of a group times a share
//     z = round(qmin - lo / s)              of a grid with zero points
//     c = clamp(round(x / s + z))           half to even, with s as it is stored; or the nearest 8-bit float (e4m3)
//
// Or with scales and zero points that are fixed beforehand, one for each head or one for all. All of it is fp32, and no
// product is fused with a sum, as in torch. Codes of at most 4 bits lie in pairs: byte j of a head holds code j in its low
// bits and code j + ceil(d / 2) in its high ones, each with 8 added.

#include "arguments.h"
#include "halves.h"

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

constexpr int64_t GRAIN = 1 << 14;         // channels below which another thread costs more than it gains
constexpr float MAGIC = 12582912.0f;       // 1.5 * 2^23: adding it rounds to an integer, half to even

struct Problem {
  const void* x;
  Kind kind, scale_kind;
  int64_t n, heads, d, group;              // group: channels under a scale; d of a head divides it, or it divides d
  float qmin, qmax, reach, share, epsilon; // epsilon: the scale of a group whose own is rounded to 0
  bool is_float, is_symmetric, in_pairs;
  const float *fixed_scales, *fixed_zeros; // [fixed], or null
  int64_t fixed;
  uint8_t* codes;                          // [n, heads, d or ceil(d / 2)]
  void* scales;                            // [n, groups], or null where they are fixed
  int8_t* zeros;                           // [n, groups], or null

  int64_t channels() const { return heads * d; }
  int64_t groups() const { return channels() / group; }
};

struct Grid {
  float scale, zero;
};

Grid fit(const Problem& p, const float* x) {
  float lo = 0, hi = 0;
  for (int64_t i = 0; i < p.group; i++) {
    lo = x[i] < lo ? x[i] : lo;
    hi = x[i] > hi ? x[i] : hi;
  }
  lo *= p.share, hi *= p.share;
  const float wide = p.is_symmetric ? std::max(-lo, hi) / p.reach : (hi - lo) / (p.qmax - p.qmin);
  const float scale = stored(wide, p.scale_kind);
  float zero = 0;
  if (!p.is_symmetric) {
    const float exact = p.qmin - lo / scale;
    zero = exact != exact ? 0 : std::min(std::max(exact, p.qmin), p.qmax);
    zero = (zero + MAGIC) - MAGIC;
  }
  return {scale == 0 ? p.epsilon : scale, zero};
}

// The nearest e4m3 of a number between -448 and 448, or of NaN.
INLINE uint8_t to_e4m3(float value) {
  const uint32_t bits = bits_of(value), size = bits & 0x7fffffff, sign = bits >> 24 & 0x80;
  if (size > 0x7f800000) return sign | 0x7f;
  if (size < 0x3c800000) return sign | (bits_of(from_bits(size) + 16384.0f) & 0xff);  // subnormal: units of 2^-9
  return sign | (size - 0x3c000000 + 0x7ffff + (size >> 20 & 1)) >> 20;
}

// codes [group] of a group, as signed integers or as bytes of floats
void code(const Problem& p, const float* x, Grid grid, int8_t* codes) {
  if (p.is_float) {
    for (int64_t i = 0; i < p.group; i++) {
      const float exact = x[i] / grid.scale + 0.0f;
      codes[i] = int8_t(to_e4m3(std::min(std::max(exact, p.qmin), p.qmax)));
    }
    return;
  }
  for (int64_t i = 0; i < p.group; i++) {
    const float exact = x[i] / grid.scale + grid.zero;
    codes[i] = int8_t((std::min(std::max(exact, p.qmin), p.qmax) + MAGIC) - MAGIC);
  }
}

void lay_out(const Problem& p, const int8_t* codes, uint8_t* to) {
  if (!p.in_pairs) {
    std::memcpy(to, codes, p.channels());
    return;
  }
  const int64_t half = (p.d + 1) / 2;
  for (int64_t h = 0; h < p.heads; h++, codes += p.d, to += half) {
    for (int64_t j = 0; j < half; j++) {
      const int high = j + half < p.d ? codes[j + half] + 8 : 8;
      to[j] = uint8_t((codes[j] + 8) | high << 4);
    }
  }
}

void run(int64_t first, int64_t last, void* made) {
  const Problem& p = *static_cast<const Problem*>(made);
  std::vector<float> x(p.channels());
  std::vector<int8_t> codes(p.channels());
  const int64_t bytes = p.heads * (p.in_pairs ? (p.d + 1) / 2 : p.d);
  for (int64_t token = first; token < last; token++) {
    for (int64_t i = 0; i < p.channels(); i++) x[i] = number(p.x, token * p.channels() + i, p.kind);
    for (int64_t g = 0; g < p.groups(); g++) {
      const float* part = x.data() + g * p.group;
      Grid grid;
      if (p.fixed_scales) {
        const int64_t at = p.fixed == 1 ? 0 : g;
        grid = {p.fixed_scales[at], p.fixed_zeros ? p.fixed_zeros[at] : 0};
      } else {
        grid = fit(p, part);
        store(p.scales, token * p.groups() + g, grid.scale, p.scale_kind);
        if (p.zeros) p.zeros[token * p.groups() + g] = int8_t(grid.zero);
      }
      code(p, part, grid, codes.data() + g * p.group);
    }
    lay_out(p, codes.data(), p.codes + token * bytes);
  }
}

float real(StableIValue value) {           // of an argument of torch's type float
  double wide;
  std::memcpy(&wide, &value, sizeof wide);
  return float(wide);
}

// code_tokens_of_cpu(Tensor x, Tensor scales, Tensor zeros, int heads, int group, int bits, int in_pairs, int is_symmetric,
// int scale_kind, float share) -> (Tensor, Tensor, Tensor): codes, scales and zero points. x contiguous; scales and zeros
// fp32, empty where they are those of the tokens; bits 0 for e4m3; scale_kind a number of Kind.
void boxed_code_tokens(StableIValue* stack, uint64_t, uint64_t) {
  const Argument x(stack[0]), scales(stack[1]), zeros(stack[2]);
  const int64_t bits = int64_t(stack[5]), levels = int64_t(1) << (bits ? bits - 1 : 0);
  Problem p{};
  p.x = x.data(), p.kind = kind_of(x), p.scale_kind = Kind(int64_t(stack[8]));
  p.n = x.size(0), p.heads = int64_t(stack[3]), p.d = x.size(1) / p.heads, p.group = int64_t(stack[4]);
  p.is_float = bits == 0, p.in_pairs = int64_t(stack[6]), p.is_symmetric = int64_t(stack[7]);
  p.qmin = p.is_float ? -448.0f : -float(levels), p.qmax = p.is_float ? 448.0f : float(levels - 1);
  p.reach = p.is_float ? 448.0f : (p.qmax - p.qmin) / 2;
  p.share = real(stack[9]), p.epsilon = epsilon(p.scale_kind);
  p.fixed = scales.size(0);
  p.fixed_scales = p.fixed ? reinterpret_cast<const float*>(scales.data()) : nullptr;
  p.fixed_zeros = zeros.size(0) ? reinterpret_cast<const float*>(zeros.data()) : nullptr;

  const bool is_unsigned = p.is_float || p.in_pairs;
  const int32_t dtypes[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float16(), aoti_torch_dtype_bfloat16()};
  const int64_t of_token = p.fixed ? 0 : p.groups(), of_zero = p.is_symmetric ? 0 : of_token;
  const int64_t rows = p.group <= p.d ? p.heads : 1;  // of groups: heads, or one that all heads share
  AtenTensorHandle codes = empty({p.n, p.heads, p.in_pairs ? (p.d + 1) / 2 : p.d},
                                 is_unsigned ? aoti_torch_dtype_uint8() : aoti_torch_dtype_int8());
  AtenTensorHandle made_scales = empty({p.n, rows, of_token / rows}, dtypes[p.scale_kind]);
  AtenTensorHandle made_zeros = empty({p.n, rows, of_zero / rows}, aoti_torch_dtype_int8());
  p.codes = reinterpret_cast<uint8_t*>(data_of(codes));
  p.scales = data_of(made_scales);
  p.zeros = of_zero ? reinterpret_cast<int8_t*>(data_of(made_zeros)) : nullptr;
  torch_parallel_for(0, p.n, std::max<int64_t>(1, GRAIN / p.channels()), run, &p);
  stack[0] = value_of(codes), stack[1] = value_of(made_scales), stack[2] = value_of(made_zeros);
}

}  // namespace

extern "C" int32_t qlab_register() { return given_to_torch({{"code_tokens_of_cpu", boxed_code_tokens}}); }
