// Weights rounded to the nearest integer codes on a CPU, with the scales of their range and their errors in one pass:
// the arithmetic of `nearest.py`'s reference, bit for bit.
//
//     s = absmax / reach                    or (hi - lo) / (qmax - qmin), of every group of channels of a row
//     z = round(qmin - lo / s)              of a grid with zero points
//     c = clamp(round(W / s + z))           half to even, with s as it is stored
//     D = (c - z) s - W                     whose squares, and those of W, are summed in fp64
//
// All of it is fp32, and no product is fused with a sum. Numbers that are not finite, scales that are not, and errors that
// overflow end it: they are left to the reference.
//
// And such codes as the bit streams of files.
//
// Names: o rows, k channels, LANES the numbers of a vector.

#include "halves.h"
#include "paths.h"
#include "vectors.h"

#include <atomic>
#include <cstdint>
#include <cstring>
#include <exception>
#include <thread>
#include <vector>

#define UNROLL _Pragma("GCC unroll 16")

namespace {

constexpr float MAGIC = 12582912.0f;       // 1.5 * 2^23: adding it rounds to an integer, half to even
constexpr uint32_t MAGIC_BITS = 0x4b400000;
// Number j of row i is compared with number j ^ 2^i.
constexpr int32_t PARTNERS[4][16] = {
  {1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14},
  {2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13},
  {4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11},
  {8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7},
};
constexpr uint32_t INFINITE = 0x7f800000;  // the bits of infinity; those of NaN are above
constexpr int64_t AHEAD = 16;              // groups whose grids are fitted before the first of them is rounded

struct Problem {                           // as `nearest.py` fills it in
  const char* weight;                      // [o, k], channels side by side
  int64_t kind, stride, o, k, group;
  int64_t qmin, qmax;
  float reach;
  int32_t symmetric, measures;             // measures: codes, scales and zeros are there
  int64_t scale_kind;
  float epsilon;                           // the scale of a group whose own is rounded to 0
  void* scales;                            // [o, k / group]
  int8_t *zeros, *codes;                   // [o, k / group] or null; [o, k]
  int64_t rows;                            // of a part, whose sums are added up together
  double* sums;                            // [parts, 3]: of D^2, of W^2, and the largest |D| / s
};

// ---------------------------------------------------------------- the grid of one group of channels
struct Range {
  uint32_t lo, hi;                         // the bits of -lo and of hi, of lo <= 0 <= hi; of a symmetric grid those of absmax
};

struct Grid {
  float scale, zero;
};

// false where there is no finite scale
INLINE bool fit(const Problem& p, Range r, Grid& grid) {
  const float below = from_bits(r.lo), above = from_bits(r.hi);
  float scale = 0, zero = 0;
  if (p.symmetric) {
    scale = stored((below > above ? below : above) / p.reach, Kind(p.scale_kind));
  } else {
    scale = stored((above + below) / float(p.qmax - p.qmin), Kind(p.scale_kind));
    const float low = float(p.qmin), high = float(p.qmax), exact = low + below / scale;
    zero = exact != exact ? 0 : exact < low ? low : exact > high ? high : exact;
    zero = (zero + MAGIC) - MAGIC;
  }
  if (bits_of(scale) >= INFINITE) return false;
  grid = {scale == 0 ? p.epsilon : scale, zero};
  return true;
}

// ---------------------------------------------------------------- N numbers at once
template <int64_t N, Kind KIND>
struct Rows {
  typedef typename Vectors<N>::Floats Floats;
  typedef typename Vectors<N>::Ints Ints;
  typedef typename Vectors<N>::Halves Halves;
  typedef typename Vectors<N>::Bytes Bytes;
  typedef typename Vectors<N>::FirstHalf FirstHalf;
  typedef typename Vectors<N>::Doubles Doubles;
  static constexpr int64_t WIDTH = KIND == F32 ? 4 : 2;

  static INLINE Floats load(const char* at) {
    Floats x;
    if (KIND == F32) {
      std::memcpy(&x, at, sizeof x);
      return x;
    }
    Halves h;
    std::memcpy(&h, at, sizeof h);
    Ints bits;
    if constexpr (N == 16) asm("vpmovzxwd %1, %0" : "=v"(bits) : "v"(h));  // gcc converts such vectors in halves
    else bits = __builtin_convertvector(h, Ints);
    if (KIND == BF16) return (Floats)(bits << 16);
    const Ints rest = bits & 0x7fff, sign = (bits & 0x8000) << 16;
    const Ints plain = (Ints)((Floats)(rest << 13) * 0x1p112f), endless = (rest & 0x3ff) << 13 | int32_t(INFINITE);
    return (Floats)(sign | (rest >= 0x7c00 ? endless : plain));
  }

  // Of fewer, with zeros behind them, which change no range and no sum.
  static INLINE Floats load_some(const char* at, int64_t count) {
    if (count >= N) return load(at);
    char padded[N * WIDTH] = {};
    std::memcpy(padded, at, count * WIDTH);
    return load(padded);
  }

  static INLINE int32_t largest(Ints x) {
    UNROLL for (int64_t i = 0; 1 << i < N; i++) {
      Ints partners;
      std::memcpy(&partners, PARTNERS[i], sizeof partners);
      const Ints other = __builtin_shuffle(x, partners);
      x = x > other ? x : other;
    }
    return x[0];
  }

  struct Sum {                             // of squares, in fp64, where each is exact
    Doubles low{}, high{};
    INLINE void add(const Floats& x) {
      FirstHalf halves[2];
      std::memcpy(halves, &x, sizeof halves);
      add_to(low, halves[0]);
      add_to(high, halves[1]);
    }
    static INLINE void add_to(Doubles& sum, const FirstHalf& x) {
      Doubles wide;
      if constexpr (N == 16) {
        asm("vcvtps2pd %1, %0" : "=v"(wide) : "v"(x));
        asm("vfmadd231pd %1, %1, %0" : "+v"(sum) : "v"(wide));
      } else {
        wide = __builtin_convertvector(x, Doubles);
        sum += wide * wide;
      }
    }
    INLINE double total() const {
      const Doubles both = low + high;
      double found = 0;
      for (int64_t i = 0; i < N / 2; i++) found += both[i];
      return found;
    }
  };

  struct Part {                            // what is known of the errors of some rows
    Sum of_error, of_weight;
    Ints steps{};                          // the bits of the largest |D| / s
  };

  // The bits of floats that are not negative are ordered as these are; a NaN is above all.
  static INLINE Range range(const char* weight, int64_t count, bool symmetric) {
    Ints lo{}, hi{};
    for (int64_t j = 0; j < count; j += N) {
      const Ints x = (Ints)load_some(weight + j * WIDTH, count - j), opposite = x ^ int32_t(0x80000000);
      hi = x > hi ? x : hi;                // negative as an integer where the float is
      lo = opposite > lo ? opposite : lo;
    }
    if (!symmetric) return {uint32_t(largest(lo)), uint32_t(largest(hi))};
    const uint32_t both = largest(lo > hi ? lo : hi);
    return {both, both};
  }

  // Sums stay in registers while a group is rounded: `made` is a copy of them.
  static INLINE Part round(const Problem& p, const char* weight, int8_t* codes, Grid grid, Part made) {
    const int64_t whole = p.group - p.group % N;
    Ints error{};
    for (int64_t j = 0; j < whole; j += N) {
      const Bytes c = round_vector(p, load(weight + j * WIDTH), grid, made, error);
      std::memcpy(codes + j, &c, N);
    }
    if (whole < p.group) {
      const Bytes c = round_vector(p, load_some(weight + whole * WIDTH, p.group - whole), grid, made, error);
      std::memcpy(codes + whole, &c, p.group - whole);
    }
    const Ints steps = (Ints)((Floats)error / grid.scale);
    made.steps = steps > made.steps ? steps : made.steps;
    return made;
  }

  static INLINE Bytes round_vector(const Problem& p, const Floats& w, Grid grid, Part& made, Ints& error) {
    const Floats low = Floats{} + float(p.qmin), high = Floats{} + float(p.qmax);
    Floats x = w / grid.scale + grid.zero;
    x = x < low ? low : x;
    x = x > high ? high : x;
    const Floats shifted = x + MAGIC;
    const Floats d = ((shifted - MAGIC) - grid.zero) * grid.scale - w;
    const Ints size = (Ints)d & 0x7fffffff;
    error = size > error ? size : error;
    made.of_error.add(d);
    made.of_weight.add(w);
    return __builtin_convertvector((Ints)shifted - int32_t(MAGIC_BITS), Bytes);
  }

  // Of codes that are there; false where a scale is 0.
  static INLINE bool measure(const Problem& p, const char* weight, const int8_t* codes, Grid grid, Part& part) {
    Part made = part;
    Ints error{};
    for (int64_t j = 0; j < p.group; j += N) {
      const int64_t count = p.group - j < N ? p.group - j : N;
      const Floats w = load_some(weight + j * WIDTH, count);
      Bytes c{};
      if (count == N) std::memcpy(&c, codes + j, N);
      else std::memcpy(&c, codes + j, count);
      Floats d = (floats_of(c) - grid.zero) * grid.scale - w;
      if (count < N) {
        const Floats whole = d;
        d = Floats{};
        std::memcpy(&d, &whole, count * sizeof(float));
      }
      const Ints size = (Ints)d & 0x7fffffff;
      error = size > error ? size : error;
      made.of_error.add(d);
      made.of_weight.add(w);
    }
    const float scale = from_bits(bits_of(grid.scale) & 0x7fffffff);
    const Ints steps = (Ints)((Floats)error / scale);
    made.steps = steps > made.steps ? steps : made.steps;
    part = made;
    return scale > 0;
  }

  static INLINE Floats floats_of(const Bytes& c) {
    Ints wide;
    if constexpr (N == 16) asm("vpmovsxbd %1, %0" : "=v"(wide) : "v"(c));  // as in `load`
    else wide = __builtin_convertvector(c, Ints);
    return __builtin_convertvector(wide, Floats);
  }

  // That of group `at`, which is there or is written; false where there is none.
  static INLINE bool grid_of(const Problem& p, const char* weight, int64_t at, Grid& grid) {
    if (p.measures) {
      grid = {number(p.scales, at, Kind(p.scale_kind)), p.zeros ? float(p.zeros[at]) : 0};
      return true;
    }
    const Range r = range(weight, p.group, p.symmetric);
    if (r.lo >= INFINITE || r.hi >= INFINITE || !fit(p, r, grid)) return false;
    store(p.scales, at, grid.scale, Kind(p.scale_kind));
    if (p.zeros) p.zeros[at] = int8_t(grid.zero);
    return true;
  }

  static INLINE bool run(const Problem& p) {
    const int64_t groups = p.k / p.group;
    for (int64_t first = 0; first < p.o; first += p.rows) {
      Part part;
      const int64_t last = first + p.rows < p.o ? first + p.rows : p.o;
      for (int64_t row = first; row < last; row++) {
        const char* weight = p.weight + row * p.stride * WIDTH;
        for (int64_t g = 0; g < groups; g += AHEAD) {
          const int64_t count = groups - g < AHEAD ? groups - g : AHEAD, at = row * groups + g;
          const char* here = weight + g * p.group * WIDTH;
          int8_t* codes = p.codes + row * p.k + g * p.group;
          Grid grids[AHEAD];               // first, since they wait for their ranges and do not wait for each other
          for (int64_t i = 0; i < count; i++) {
            if (!grid_of(p, here + i * p.group * WIDTH, at + i, grids[i])) return false;
          }
          for (int64_t i = 0; i < count; i++, here += p.group * WIDTH, codes += p.group) {
            if (!p.measures) part = round(p, here, codes, grids[i], part);
            else if (!measure(p, here, codes, grids[i], part)) return false;
          }
        }
      }
      double* sums = p.sums + 3 * (first / p.rows);
      const uint32_t steps = largest(part.steps);
      sums[0] = part.of_error.total(), sums[1] = part.of_weight.total(), sums[2] = from_bits(steps);
      if (steps >= INFINITE) return false;
    }
    return true;
  }
};

// The rows of `count` parts from part `first` on.
INLINE Problem rows_of(Problem p, int64_t first, int64_t count) {
  const int64_t row = first * p.rows, groups = p.k / p.group;
  p.weight += row * p.stride * (p.kind == F32 ? 4 : 2);
  p.scales = static_cast<char*>(p.scales) + row * groups * (p.scale_kind == F32 ? 4 : 2);
  if (p.zeros) p.zeros += row * groups;
  p.codes += row * p.k;
  p.sums += 3 * first;
  p.o = p.o - row < count * p.rows ? p.o - row : count * p.rows;
  return p;
}

template <int64_t N>
INLINE bool run(const Problem& p) {
  if (p.kind == F32) return Rows<N, F32>::run(p);
  return p.kind == F16 ? Rows<N, F16>::run(p) : Rows<N, BF16>::run(p);
}

// ---------------------------------------------------------------- codes as the bit streams of files
// Of 4 bits, two in a byte, or of 8: each is stored without its sign, with 8 or 128 added.
struct Stream {
  uint8_t *codes, *bytes;
  int64_t count, bits;                     // of codes, an even number of them
};

INLINE void pack(const Stream& p) {
  if (p.bits == 8) {
    for (int64_t i = 0; i < p.count; i++) p.bytes[i] = p.codes[i] ^ 0x80;
    return;
  }
  for (int64_t i = 0; i < p.count / 2; i++) {
    uint16_t pair;
    std::memcpy(&pair, p.codes + 2 * i, 2);
    p.bytes[i] = uint8_t((pair & 0x0f) | (pair >> 4 & 0xf0)) ^ 0x88;
  }
}

INLINE void unpack(const Stream& p) {
  if (p.bits == 8) {
    for (int64_t i = 0; i < p.count; i++) p.codes[i] = p.bytes[i] ^ 0x80;
    return;
  }
  for (int64_t i = 0; i < p.count / 2; i++) {
    const uint16_t pair = (p.bytes[i] & 0x0f) | (p.bytes[i] & 0xf0) << 4;
    const uint16_t less = (pair + 0x7878) ^ 0x8080;  // 8 less, without a borrow
    std::memcpy(p.codes + 2 * i, &less, 2);
  }
}

// Copies of their arguments, which no byte that is written can be a part of.
void pack_portable(Stream p) { pack(p); }
AVX2 void pack_avx2(Stream p) { pack(p); }
AVX512 void pack_avx512(Stream p) { pack(p); }
void unpack_portable(Stream p) { unpack(p); }
AVX2 void unpack_avx2(Stream p) { unpack(p); }
AVX512 void unpack_avx512(Stream p) { unpack(p); }

bool round_portable(Problem p) { return run<4>(p); }
AVX2 bool round_avx2(Problem p) { return run<8>(p); }
AVX512 bool round_avx512(Problem p) { return run<16>(p); }

}  // namespace

extern "C" {

// 0 where all is rounded, 1 where the reference has to say. Parts of the rows are rounded by so many threads, or by
// fewer where the system has no more: the calling one rounds what no other took.
int32_t qlab_round(const Problem* problem, int64_t path, int64_t threads) {
  const auto round_rows = path == PATH_AVX512 ? round_avx512 : path == PATH_AVX2 ? round_avx2 : round_portable;
  const int64_t parts = (problem->o + problem->rows - 1) / problem->rows, each = (parts + threads - 1) / threads;
  std::atomic<bool> fits{true};
  const auto round_from = [=, &fits](int64_t first) { if (!round_rows(rows_of(*problem, first, each))) fits = false; };
  std::vector<std::thread> others;
  others.reserve(threads);
  int64_t taken = each;
  try {
    for (; taken < parts; taken += each) others.emplace_back(round_from, taken);
  } catch (const std::exception&) {
  }
  round_from(0);
  for (; taken < parts; taken += each) round_from(taken);
  for (std::thread& other : others) other.join();
  return !fits;
}

void qlab_pack(const Stream* stream, int64_t path) {
  (path == PATH_AVX512 ? pack_avx512 : path == PATH_AVX2 ? pack_avx2 : pack_portable)(*stream);
}

void qlab_unpack(const Stream* stream, int64_t path) {
  (path == PATH_AVX512 ? unpack_avx512 : path == PATH_AVX2 ? unpack_avx2 : unpack_portable)(*stream);
}

}
