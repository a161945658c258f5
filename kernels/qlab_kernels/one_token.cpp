// y [b, h, g, e] = softmax(q . k + mask) v on a CPU, of one new token in each of b rows: q [b, h, g, d] of the g query
// heads that share a key head, keys [b, h, l, d] and values [b, h, l, e] where they lie.
//
//     s_l = q . k_l         over channels, in 16 partial sums that are added as a tree
//     p_l = exp(s_l - max s) / sum exp(s - max s)
//     y   = sum over l of p_l v_l, in the order of l
//
// Positions that a mask leaves out add nothing, whatever lies there. So the bits of a row depend on its own tokens alone:
// not on how many positions stand behind them, nor on rows beside it, threads or the width of the processor's vectors.
//
// Names: T a number of keys and values, G query heads that share what is loaded, lanes the 16 numbers of a vector.

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#define AVX512 __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")))
#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

namespace {

constexpr int64_t LANES = 16;
constexpr int64_t SOME = 4;                // query heads that are computed at once
constexpr int64_t GRAIN = 1 << 16;         // products below which another thread costs more than it gains

struct Problem {                           // strides in numbers; channels lie side by side
  const float* q;                          // [b, h, g, d], scaled, contiguous
  const void *k, *v;
  const bool* mask;                        // [b, l], or null
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
// s [G, l]: q . k, and -inf where the mask leaves a position out
template <int64_t G, class L, class T>
INLINE void score(const Problem& p, const float* q, const T* k, const bool* mask, float* s) {
  for (int64_t l = 0; l < p.l; l++, k += p.k_l) {
    if (mask && !mask[l * p.mask_l]) {
      UNROLL for (int64_t i = 0; i < G; i++) s[i * p.l + l] = -INFINITY;
      continue;
    }
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
INLINE void mix(const Problem& p, const float* s, const T* v, float* y) {
  for (int64_t c = 0; c < p.e; c += 2 * LANES) {
    const int64_t left = p.e - c;
    L sums[2][G];
    UNROLL for (int64_t i = 0; i < G; i++) sums[0][i] = sums[1][i] = L::all(0);
    const T* at = v + c;
    for (int64_t l = 0; l < p.l; l++, at += p.v_l) {
      bool any = false;
      UNROLL for (int64_t i = 0; i < G; i++) any = any || s[i * p.l + l] != 0.0f;
      if (!any) continue;
      const L first = L::load_some(at, left);
      UNROLL for (int64_t i = 0; i < G; i++) sums[0][i].add_product(s[i * p.l + l], first);
      if (left <= LANES) continue;
      const L second = L::load_some(at + LANES, left - LANES);
      UNROLL for (int64_t i = 0; i < G; i++) sums[1][i].add_product(s[i * p.l + l], second);
    }
    UNROLL for (int64_t i = 0; i < G; i++) {
      sums[0][i].store_some(y + i * p.e + c, left);
      if (left > LANES) sums[1][i].store_some(y + i * p.e + c + LANES, left - LANES);
    }
  }
}

template <int64_t G, class L, class T>
INLINE void attend_heads(const Problem& p, const float* q, const T* k, const T* v, const bool* mask, float* s, float* y) {
  score<G, L>(p, q, k, mask, s);
  for (int64_t i = 0; i < G; i++) softmax<L>(s + i * p.l, p.l);
  mix<G, L>(p, s, v, y);
}

// tasks first..last of b * h
template <class L, class T>
INLINE void attend(const Problem& p, int64_t first, int64_t last) {
  std::vector<float> scores(SOME * p.l);
  for (int64_t task = first; task < last; task++) {
    const int64_t b = task / p.h, h = task % p.h;
    const T* k = static_cast<const T*>(p.k) + b * p.k_b + h * p.k_h;
    const T* v = static_cast<const T*>(p.v) + b * p.v_b + h * p.v_h;
    const bool* mask = p.mask ? p.mask + b * p.mask_b : nullptr;
    for (int64_t i = 0; i < p.g; i += SOME) {
      const float* q = p.q + (task * p.g + i) * p.d;
      float* y = p.y + (task * p.g + i) * p.e;
      switch (std::min(SOME, p.g - i)) {
        case 1: attend_heads<1, L>(p, q, k, v, mask, scores.data(), y); break;
        case 2: attend_heads<2, L>(p, q, k, v, mask, scores.data(), y); break;
        case 3: attend_heads<3, L>(p, q, k, v, mask, scores.data(), y); break;
        default: attend_heads<4, L>(p, q, k, v, mask, scores.data(), y);
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

}  // namespace

// kind: 0 float, 1 bfloat16. sizes: b, h, g, l, d, e. strides: those of k, of v and of the mask. path: 0 the best that
// the processor runs, 1 portable, 2 AVX-512 where it has that. Returns the path that was taken.
extern "C" int64_t qlab_one_token(const float* q, const void* k, const void* v, const bool* mask, float* y, int64_t kind,
                                  const int64_t* sizes, const int64_t* strides, int64_t path) {
  Job job{{q, k, v, mask, y, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], strides[0], strides[1], strides[2],
           strides[3], strides[4], strides[5], strides[6], strides[7]},
          kind == 1};
  __builtin_cpu_init();
  const bool has_avx512 = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl");
  const int64_t taken = has_avx512 && path != 1 ? 2 : 1;
  const int64_t numbers = job.problem.g * job.problem.l * (job.problem.d + job.problem.e);
  const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, numbers));
  torch_parallel_for(0, job.problem.b * job.problem.h, grain, taken == 2 ? run_avx512 : run_portable, &job);
  return taken;
}
