// Rows of logits on a CPU, read into fp32: the greatest number of every lane and block, and by them where the greatest of a
// row lie, without a sort of all.
//
// Names: v tokens of the vocabulary, W the numbers of a vector, lane each of them in the vectors of one block.

#pragma once

#include "bits.h"
#include "vectors.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t BLOCK = 512;
enum Kind : int64_t { F32, BF16 };

typedef float Four __attribute__((vector_size(16)));
template <int64_t W>
using Floats = typename Vectors<W>::Floats;
template <int64_t W>
using Ints = typename Vectors<W>::Ints;
template <int64_t W>
using Doubles = typename Vectors<W>::Doubles;

template <int64_t W>
INLINE Floats<W> all(float x) {
  return Floats<W>{} + x;
}
template <class V, class N>
INLINE V load(const N* from) {
  V x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
template <class V>
INLINE V greater(V x, V y) {
  return x > y ? x : y;
}
template <class V>
INLINE V lesser(V x, V y) {
  return x < y ? x : y;
}
template <class V>
INLINE V size_of(V x) {
  return greater(x, -x);
}
template <class V>
INLINE float max_of(V x) {
  Four four[sizeof x / sizeof(Four)];
  std::memcpy(four, &x, sizeof x);
  for (const Four& other : four) four[0] = greater(four[0], other);
  return std::max(std::max(four[0][0], four[0][1]), std::max(four[0][2], four[0][3]));
}
template <class V>
INLINE float sum_of(V x) {
  Four four[sizeof x / sizeof(Four)], sums = {};
  std::memcpy(four, &x, sizeof x);
  for (const Four& other : four) sums += other;
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

struct Logits {                            // of one row
  int64_t blocks;
  std::vector<float> x;                    // [blocks * BLOCK], -inf behind the last
  std::vector<float> greatest;             // [blocks * W], of every lane
  std::vector<float> best;                 // [blocks]

  template <int64_t W>
  void resize(int64_t v) {
    blocks = (v + BLOCK - 1) / BLOCK;
    x.resize(blocks * BLOCK), greatest.resize(blocks * W), best.resize(blocks);
    std::fill(x.begin() + v, x.end(), -INFINITY);
  }
};

// The numbers from i to `end`, in fp32.
template <int64_t W>
INLINE void copy(const void* from, int64_t kind, int64_t i, int64_t end, float* x) {
  if (kind == F32) {
    std::memcpy(x + i, static_cast<const float*>(from) + i, (end - i) * sizeof(float));
    return;
  }
  const uint16_t* halves = static_cast<const uint16_t*>(from);
  for (; i + W <= end; i += W) {
    const Ints<W> bits = __builtin_convertvector(load<typename Vectors<W>::Halves>(halves + i), Ints<W>) << 16;
    std::memcpy(x + i, &bits, sizeof bits);
  }
  for (; i < end; i++) x[i] = from_bits(uint32_t(halves[i]) << 16);
}

template <int64_t W>
struct Most {                              // of the blocks that were added
  Floats<W> odd = {};                      // 1 where a number is NaN
  float most = -INFINITY;

  INLINE void add(int64_t c, Logits& logits) {
    Floats<W> greatest = all<W>(-INFINITY);
    for (int64_t i = 0; i < BLOCK; i += W) {
      const auto x = load<Floats<W>>(&logits.x[c * BLOCK + i]);
      odd = x == x ? odd : all<W>(1);
      greatest = greater(x, greatest);
    }
    std::memcpy(&logits.greatest[c * W], &greatest, sizeof greatest);
    logits.best[c] = max_of(greatest);
    most = std::max(most, logits.best[c]);
  }
  INLINE float value() const { return max_of(odd) > 0 ? NAN : most; }
};

// Fills in the greatest numbers of lanes and blocks. The greatest of all, or NaN where one is.
template <int64_t W>
INLINE float most_of(Logits& logits) {
  Most<W> most;
  for (int64_t c = 0; c < logits.blocks; c++) most.add(c, logits);
  return most.value();
}

// The same of v numbers, each block while it is near.
template <int64_t W>
INLINE float read(const void* from, int64_t kind, int64_t v, Logits& logits) {
  Most<W> most;
  for (int64_t c = 0; c < logits.blocks; c++) {
    copy<W>(from, kind, c * BLOCK, std::min((c + 1) * BLOCK, v), logits.x.data());
    most.add(c, logits);
  }
  return most.value();
}

int64_t first_of(float most, const Logits& logits) {
  const int64_t c = std::find(logits.best.begin(), logits.best.end(), most) - logits.best.begin();
  const auto x = logits.x.begin() + c * BLOCK;
  return std::find(x, x + BLOCK, most) - logits.x.begin();
}

struct Span {
  float low = -FLT_MAX, high = INFINITY;
};
struct Ranked {
  float kth, next;                         // the k-th greatest of some numbers, and the greatest that is less than it
};

// Of numbers of which `most` is the greatest, and none is NaN. The k-th greatest lies from low to high, which are two of
// them, and how many are not below the middle says on which side of it. The middle is where it were if numbers lay evenly
// between the two, and a tenth further, so that both move. It is probably in a span, whose ends are tried first.
template <int64_t W>
INLINE Ranked ranked(int64_t k, float most, const float* from, int64_t count, Span probably = {}) {
  const Floats<W> none = {}, one = all<W>(1), least = all<W>(-INFINITY);
  float low = -INFINITY, next = low, high = most, middle = probably.low;
  float from_low = count, from_high = 1;   // how many are not below it
  while (low < high) {
    Floats<W> found = none, above = -least, below = least;
    for (int64_t i = 0; i < count; i += W) {
      const auto x = load<Floats<W>>(from + i);
      found += x >= middle ? one : none;
      above = lesser(x >= middle ? x : -least, above);
      below = greater(x >= middle ? least : x, below);
    }
    const float not_below = sum_of(found);
    if (not_below < k) high = max_of(below), from_high = not_below;
    else low = -max_of(-above), next = max_of(below), from_low = not_below;
    if (not_below == k) break;
    const float even = (from_low - k) / (from_low - from_high), part = even < 0.5f ? even + 0.1f : even - 0.1f;
    middle = low == -INFINITY ? -FLT_MAX : low * (1 - part) + high * part;
    if (low < probably.high && probably.high < high) middle = probably.high;
    if (!(middle > low && middle < high)) middle = high;  // hardly anything lies between them
  }
  return {low, next};
}

// Of all numbers of a row. Were they in any order, as many lanes would hold one of the k greatest as `lanes`, off by twice
// the deviation; the lanes' greatest numbers of such ranks are the span.
template <int64_t W>
INLINE Ranked ranked(int64_t k, float most, const Logits& logits) {
  const int64_t all = logits.blocks * W, count = logits.blocks * BLOCK;
  const float share = 1 - std::pow(1 - float(k) / count, float(BLOCK / W)), lanes = all * share;
  const float off = 2 * std::sqrt(lanes * (1 - share)) + 1, *greatest = logits.greatest.data();
  Span span;
  span.low = ranked<W>(std::min<int64_t>(lanes + off, all), most, greatest, all).kth;
  span.high = ranked<W>(std::max<int64_t>(lanes - off, 1), most, greatest, all).kth;
  return ranked<W>(k, most, logits.x.data(), count, span);
}

// Whether k places are few beside the lanes, so that the lanes that hold them are few beside all.
template <int64_t W>
INLINE bool are_few(int64_t k, const Logits& logits) {
  return 8 * k <= logits.blocks * W;
}

// A number that the k-th greatest of a row is not below: of few, that of the lanes' greatest.
template <int64_t W>
INLINE float bound(int64_t k, float most, const Logits& logits) {
  if (are_few<W>(k, logits)) return ranked<W>(k, most, logits.greatest.data(), logits.blocks * W).kth;
  return ranked<W>(k, most, logits).kth;
}

// Calls `act` with the places of all numbers that are not below the least.
template <int64_t W, class Act>
INLINE void each_not_below(float least, const Logits& logits, Act act) {
  for (int64_t lane = 0; lane < logits.blocks * W; lane++) {
    if (logits.greatest[lane] < least) continue;
    const int64_t first = lane / W * BLOCK + lane % W;
    for (int64_t i = first; i < first + BLOCK; i += W)
      if (logits.x[i] >= least) act(i);
  }
}

}  // namespace
