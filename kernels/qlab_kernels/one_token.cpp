// y [b, h, g, e] = softmax(q . k + mask) v on a CPU, of one new token in each of b rows: q [b, h, g, d] of the g query
// heads that share a key head, keys [b, h, l, d] and values [b, h, l, e] where they lie; or keys [slots, h, d] and values
// [slots, h, e], of which row b reads those in the slots at [b, l].
//
//     s_l = q . k_l         over channels, in 16 partial sums that are added as a tree
//     p_l = exp(s_l - max s) / sum exp(s - max s)
//     y   = sum over l of p_l v_l, in the order of l
//
// Positions that a mask leaves out add nothing, whatever lies there. So the bits of a row depend on its own tokens alone:
// not on how many positions stand behind them, nor on rows beside it, threads or the width of the processor's vectors.
//
// Names: T a number of keys and values, G query heads that share what is loaded, lanes the 16 numbers of a vector.

#include "arguments.h"
#include "bits.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#define AVX512 __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")))
#define UNROLL _Pragma("GCC unroll 8")

namespace {

constexpr int64_t LANES = 16;
constexpr int64_t SOME = 4;                // query heads that are computed at once
constexpr int64_t GRAIN = 1 << 16;         // products below which another thread costs more than it gains

struct Problem {                           // strides in numbers; channels lie side by side
  const float* q;                          // [b, h, g, d], scaled, contiguous
  const void *k, *v;
  const bool* mask;                        // [b, l], or null
  const int64_t* at;                       // [b, l], contiguous, or null
  float* y;                                // [b, h, g, e], contiguous
  int64_t b, h, g, l, d, e;
  int64_t k_b, k_h, k_l, v_b, v_h, v_l, mask_b, mask_l;
};

// ---------------------------------------------------------------- vectors
template <int64_t W>
struct Registers;
template <>
struct Registers<4> {
  typedef float Part __attribute__((vector_size(16)));
  typedef int32_t Ints __attribute__((vector_size(16)));
  typedef uint16_t Halves __attribute__((vector_size(8)));
};
template <>
struct Registers<16> {
  typedef float Part __attribute__((vector_size(64)));
  typedef int32_t Ints __attribute__((vector_size(64)));
  typedef uint16_t Halves __attribute__((vector_size(32)));
};

// 16 numbers in registers of W: what is computed with them does not depend on W.
template <int64_t W>
struct Lanes {
  typedef typename Registers<W>::Part Part;
  typedef typename Registers<W>::Ints Ints;
  typedef typename Registers<W>::Halves Halves;
  static constexpr int64_t PARTS = LANES / W;
  Part part[PARTS];

  static INLINE Lanes all(float x) {
    Lanes made;
    UNROLL for (int64_t i = 0; i < PARTS; i++) made.part[i] = Part{} + x;
    return made;
  }
  static INLINE Lanes load(const float* from) {
    Lanes made;
    std::memcpy(made.part, from, sizeof made.part);
    return made;
  }
  static INLINE Lanes load(const uint16_t* from) {  // bfloat16: the upper half of a float
    Lanes made;
    UNROLL for (int64_t i = 0; i < PARTS; i++) {
      Halves x;
      std::memcpy(&x, from + i * W, sizeof x);
      made.part[i] = (Part)(__builtin_convertvector(x, Ints) << 16);
    }
    return made;
  }
  template <class T>
  static INLINE Lanes load_some(const T* from, int64_t count) {
    if (count >= LANES) return load(from);
    T padded[LANES] = {};
    std::memcpy(padded, from, count * sizeof(T));
    return load(padded);
  }
  INLINE void store_some(float* to, int64_t count) const {
    if (count >= LANES) std::memcpy(to, part, sizeof part);
    else std::memcpy(to, part, count * sizeof(float));
  }
  INLINE void add_product(const Lanes& x, const Lanes& y) {
    UNROLL for (int64_t i = 0; i < PARTS; i++) part[i] += x.part[i] * y.part[i];
  }
  INLINE void add_product(float x, const Lanes& y) {
    UNROLL for (int64_t i = 0; i < PARTS; i++) part[i] += x * y.part[i];
  }
  INLINE void add(const Lanes& x) {
    UNROLL for (int64_t i = 0; i < PARTS; i++) part[i] += x.part[i];
  }
};

typedef float Four __attribute__((vector_size(16)));

// The numbers as a tree: those 8 apart first, then 4, 2 and 1.
template <int64_t W>
INLINE float sum(const Lanes<W>& x) {
  Four four[4];
  std::memcpy(four, x.part, sizeof four);
  const Four sums = (four[0] + four[2]) + (four[1] + four[3]);
  return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

// e^x for x in [-87, 0], to 2 ulp: 2^n e^r with r in [-ln 2 / 2, ln 2 / 2]; 0 below.
template <class L>
INLINE L exponential(const L& of) {
  typedef typename L::Part Part;
  const Part magic = Part{} + 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer
  L made;
  UNROLL for (int64_t i = 0; i < L::PARTS; i++) {
    const Part x = of.part[i] < -87.0f ? Part{} - 87.0f : of.part[i];
    const Part n = (x * 1.44269504f + magic) - magic, r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    Part p = Part{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const Part power = (Part)((__builtin_convertvector(n, typename L::Ints) + 127) << 23);
    made.part[i] = of.part[i] < -87.0f ? Part{} : p * power;
  }
  return made;
}

// ---------------------------------------------------------------- one key head of one row
// Where position l lies, in strides.
INLINE int64_t place(const int64_t* at, int64_t l) { return at ? at[l] : l; }

// s [G, l]: q . k, and -inf where the mask leaves a position out
template <int64_t G, class L, class T>
INLINE void score(const Problem& p, const float* q, const T* keys, const int64_t* at, const bool* mask, float* s) {
  for (int64_t l = 0; l < p.l; l++) {
    if (mask && !mask[l * p.mask_l]) {
      UNROLL for (int64_t i = 0; i < G; i++) s[i * p.l + l] = -INFINITY;
      continue;
    }
    const T* k = keys + place(at, l) * p.k_l;
    L dots[G];
    UNROLL for (int64_t i = 0; i < G; i++) dots[i] = L::all(0);
    int64_t c = 0;
    for (; c + LANES <= p.d; c += LANES) {
      const L of_k = L::load(k + c);
      UNROLL for (int64_t i = 0; i < G; i++) dots[i].add_product(L::load(q + i * p.d + c), of_k);
    }
    if (c < p.d) {
      const L of_k = L::load_some(k + c, p.d - c);
      UNROLL for (int64_t i = 0; i < G; i++) dots[i].add_product(L::load_some(q + i * p.d + c, p.d - c), of_k);
    }
    UNROLL for (int64_t i = 0; i < G; i++) s[i * p.l + l] = sum(dots[i]);
  }
}

template <class L>
INLINE void softmax(float* s, int64_t count) {
  const float most = *std::max_element(s, s + count);
  if (most == -INFINITY) {                 // a row without positions: nothing is read
    std::fill(s, s + count, 0.0f);
    return;
  }
  L sums = L::all(0);
  for (int64_t l = 0; l < count; l += LANES) {
    float padded[LANES];
    const int64_t some = std::min(LANES, count - l);
    for (int64_t i = 0; i < LANES; i++) padded[i] = i < some ? s[l + i] - most : -INFINITY;
    const L kept = exponential(L::load(padded));
    sums.add(kept);
    kept.store_some(s + l, some);
  }
  const float whole = sum(sums);
  for (int64_t l = 0; l < count; l++) s[l] /= whole;
}

// y [G, e] = p [G, l] v; two vectors of channels at a time
template <int64_t G, class L, class T>
INLINE void mix(const Problem& p, const float* s, const T* values, const int64_t* at, float* y) {
  for (int64_t c = 0; c < p.e; c += 2 * LANES) {
    const int64_t left = p.e - c;
    L sums[2][G];
    UNROLL for (int64_t i = 0; i < G; i++) sums[0][i] = sums[1][i] = L::all(0);
    for (int64_t l = 0; l < p.l; l++) {
      bool any = false;
      UNROLL for (int64_t i = 0; i < G; i++) any = any || s[i * p.l + l] != 0.0f;
      if (!any) continue;
      const T* v = values + place(at, l) * p.v_l + c;
      const L first = L::load_some(v, left);
      UNROLL for (int64_t i = 0; i < G; i++) sums[0][i].add_product(s[i * p.l + l], first);
      if (left <= LANES) continue;
      const L second = L::load_some(v + LANES, left - LANES);
      UNROLL for (int64_t i = 0; i < G; i++) sums[1][i].add_product(s[i * p.l + l], second);
    }
    UNROLL for (int64_t i = 0; i < G; i++) {
      sums[0][i].store_some(y + i * p.e + c, left);
      if (left > LANES) sums[1][i].store_some(y + i * p.e + c + LANES, left - LANES);
    }
  }
}

template <int64_t G, class L, class T>
INLINE void attend_heads(const Problem& p, const float* q, const T* k, const T* v, const int64_t* at, const bool* mask,
                         float* s, float* y) {
  score<G, L>(p, q, k, at, mask, s);
  for (int64_t i = 0; i < G; i++) softmax<L>(s + i * p.l, p.l);
  mix<G, L>(p, s, v, at, y);
}

// tasks first..last of b * h
template <class L, class T>
INLINE void attend(const Problem& p, int64_t first, int64_t last) {
  std::vector<float> scores(SOME * p.l);
  for (int64_t task = first; task < last; task++) {
    const int64_t b = task / p.h, h = task % p.h;
    const T* k = static_cast<const T*>(p.k) + b * p.k_b + h * p.k_h;
    const T* v = static_cast<const T*>(p.v) + b * p.v_b + h * p.v_h;
    const int64_t* at = p.at ? p.at + b * p.l : nullptr;
    const bool* mask = p.mask ? p.mask + b * p.mask_b : nullptr;
    for (int64_t i = 0; i < p.g; i += SOME) {
      const float* q = p.q + (task * p.g + i) * p.d;
      float* y = p.y + (task * p.g + i) * p.e;
      switch (std::min(SOME, p.g - i)) {
        case 1: attend_heads<1, L>(p, q, k, v, at, mask, scores.data(), y); break;
        case 2: attend_heads<2, L>(p, q, k, v, at, mask, scores.data(), y); break;
        case 3: attend_heads<3, L>(p, q, k, v, at, mask, scores.data(), y); break;
        default: attend_heads<4, L>(p, q, k, v, at, mask, scores.data(), y);
      }
    }
  }
}

// ---------------------------------------------------------------- processors and threads
struct Job {
  Problem problem;
  bool is_half;
};

template <int64_t W>
INLINE void run(void* made, int64_t first, int64_t last) {
  const Job& job = *static_cast<Job*>(made);
  if (job.is_half) attend<Lanes<W>, uint16_t>(job.problem, first, last);
  else attend<Lanes<W>, float>(job.problem, first, last);
}

void run_portable(int64_t first, int64_t last, void* job) { run<4>(job, first, last); }
AVX512 void run_avx512(int64_t first, int64_t last, void* job) { run<16>(job, first, last); }

// ---------------------------------------------------------------- as torch's operator
enum Path : int64_t { BEST, PORTABLE, PATH_AVX512 };

bool has_avx512() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// one_token(Tensor q, Tensor k, Tensor v, Tensor at, Tensor mask, int path) -> Tensor: q fp32 and contiguous; at and mask
// empty where k and v have rows, and where all is read.
void boxed_one_token(StableIValue* stack, uint64_t, uint64_t) {
  const Argument q(stack[0]), k(stack[1]), v(stack[2]), at(stack[3]), mask(stack[4]);
  const bool is_slots = at.size(0) > 0, is_masked = mask.size(0) > 0;
  const int64_t b = q.size(0), h = q.size(1), g = q.size(2), d = q.size(3), e = v.size(is_slots ? 2 : 3);
  AtenTensorHandle y = empty({b, h, g, e}, q.dtype());
  Job job;
  job.is_half = k.dtype() == aoti_torch_dtype_bfloat16();
  Problem& p = job.problem;
  p.q = reinterpret_cast<const float*>(q.data()), p.k = k.data(), p.v = v.data();
  p.mask = is_masked ? reinterpret_cast<const bool*>(mask.data()) : nullptr;
  p.at = is_slots ? reinterpret_cast<const int64_t*>(at.data()) : nullptr;
  p.y = reinterpret_cast<float*>(data_of(y));
  p.b = b, p.h = h, p.g = g, p.l = is_slots ? at.size(1) : k.size(2), p.d = d, p.e = e;
  p.k_b = is_slots ? 0 : k.stride(0), p.k_h = k.stride(1), p.k_l = k.stride(is_slots ? 0 : 2);
  p.v_b = is_slots ? 0 : v.stride(0), p.v_h = v.stride(1), p.v_l = v.stride(is_slots ? 0 : 2);
  p.mask_b = is_masked && mask.size(0) > 1 ? mask.stride(0) : 0, p.mask_l = is_masked ? mask.stride(3) : 0;
  const bool is_wide = has_avx512() && int64_t(stack[5]) != PORTABLE;
  const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, g * p.l * (d + e)));
  torch_parallel_for(0, b * h, grain, is_wide ? run_avx512 : run_portable, &job);
  stack[0] = value_of(y);
}

}  // namespace

extern "C" int32_t qlab_register() { return given_to_torch({{"one_token", boxed_one_token}}); }
