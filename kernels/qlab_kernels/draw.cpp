// A token for each row of logits on a CPU: what `qlab/generation/drawing.py` computes in a dozen passes, in two over the
// row and some over the parts that matter.
//
//     x = logits less penalties, plus biases; -inf for tokens that are left out
//     token = argmax x                                    where there is no temperature
//     t = (x - max x) log2(e) / T,  e = 2^t               else; 0 where a filter leaves the token out
//     block = argmax_c (log sum_{i in c} e_i + noise_c)
//     token = argmax_{i in block} (log e_i + noise_i)
//
// x and t have the reference's bits; sums and exponentials have not. Wherever the answer hangs on less than their errors
// (two tokens NEAR each other at the edge of a filter, two scores CLOSE to each other, sums CLOSE to the mass of a
// nucleus), and for numbers that are not finite, the row is UNSURE: the reference has to say. So its token is what comes,
// always.
//
// Names: v tokens of the vocabulary, W the numbers of a vector, lane each of them.

#include "bits.h"
#include "paths.h"

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

namespace {

constexpr int64_t BLOCK = 512;
constexpr float MAGIC = 12582912.0f;       // 1.5 * 2^23: adding it rounds to an integer
constexpr float NEAR = 1e-5f;              // of t: exponentials are off by 2.6e-6 of themselves, torch's by 1e-7
constexpr float CLOSE = 1e-4f;             // of scores, whose sums and logarithms are off by less than 2e-5
constexpr float FAR = -44.0f;              // of t: noise lies in [-2.9, 16.7], and no block has 2^10 times its greatest e
constexpr float LN2 = 0.69314718f, MOST_OF_BLOCK = 6.24f;  // log BLOCK
enum Kind : int64_t { F32, BF16 };
enum Answer : int64_t { UNSURE = -1, OUTSIDE = -2 };

typedef float Four __attribute__((vector_size(16)));
template <int64_t W>
struct Vectors;                            // of W numbers
#define VECTORS(W)                                               \
  template <>                                                    \
  struct Vectors<W> {                                            \
    typedef float Floats __attribute__((vector_size(4 * W)));    \
    typedef int32_t Ints __attribute__((vector_size(4 * W)));    \
    typedef uint16_t Halves __attribute__((vector_size(2 * W))); \
  };
VECTORS(4)
VECTORS(8)
VECTORS(16)
template <int64_t W>
using Floats = typename Vectors<W>::Floats;
template <int64_t W>
using Ints = typename Vectors<W>::Ints;

struct Row {                               // as `draw.py` fills it in
  const void* logits;                      // [v], side by side
  int64_t kind;
  const int64_t *prompt, *fresh, *biased, *left_out;  // tokens so far, of the prompt and new; with biases; left out
  int64_t prompt_count, fresh_count, biased_count, left_out_count;
  const float* bias;                       // [biased_count]
  double presence, frequency;
  float repetition;
  float per_t;                             // log2(e) / T; 0 takes the greatest
  int64_t top_k;                           // 0 for all
  float top_p, min_p;
  const float* noise;                      // [blocks + BLOCK]
  float above;                             // only tokens whose x is greater are drawn
  float mass;                              // of the nucleus; below 0 until it is summed up, INFINITY where all is in it
  int64_t token;                           // what comes, or an Answer; of an OUTSIDE row, `above` is x of its token
};

struct Room {                              // of one thread
  std::vector<float> x;                    // [blocks * BLOCK], -inf behind the last
  std::vector<float> greatest;             // [blocks * W], over the vectors of a block
  std::vector<float> best, score, some;    // [blocks], [blocks], a few numbers
  std::vector<uint32_t> times;             // [v] of a token so far; all 0 between rows
};

template <int64_t W>
INLINE Floats<W> all(float x) {
  return Floats<W>{} + x;
}
template <int64_t W>
INLINE Floats<W> load(const float* from) {
  Floats<W> x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
template <class V>
INLINE V greater(V x, V y) {
  return x > y ? x : y;
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

// 2^t of t <= 0, and about 2^-100 below that: 2^n p(r) with r in [-1/2, 1/2], p of the least relative error
template <int64_t W>
INLINE Floats<W> power(Floats<W> t) {
  t = t > -100.0f ? t : all<W>(-100.0f);
  const Floats<W> n = t + MAGIC, r = t - (n - MAGIC);
  const Floats<W> p = (((9.5701e-3f * r + 5.591786e-2f) * r + 2.4024745e-1f) * r + 6.9312181e-1f) * r + 9.9999926e-1f;
  return (Floats<W>)((Ints<W>)p + ((Ints<W>)n << 23));
}

// ---------------------------------------------------------------- x
template <int64_t W>
INLINE void read(const Row& row, int64_t v, Room& room) {
  float* x = room.x.data();
  if (row.kind == F32) {
    std::memcpy(x, row.logits, v * sizeof(float));
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(row.logits);
  int64_t i = 0;
  for (; i + W <= v; i += W) {
    typename Vectors<W>::Halves halves;
    std::memcpy(&halves, from + i, sizeof halves);
    const Ints<W> bits = __builtin_convertvector(halves, Ints<W>) << 16;
    std::memcpy(x + i, &bits, sizeof bits);
  }
  for (; i < v; i++) x[i] = from_bits(uint32_t(from[i]) << 16);
}

bool are_tokens(const int64_t* ids, int64_t count, int64_t v) {
  return std::all_of(ids, ids + count, [v](int64_t id) { return id >= 0 && id < v; });
}

// Penalties, biases, and what is left out. False for ids that are no tokens.
bool change(const Row& row, int64_t v, Room& room) {
  float* x = room.x.data();
  const bool repeats = row.repetition != 1.0f, counts = row.presence != 0 || row.frequency != 0;
  if (!are_tokens(row.biased, row.biased_count, v) || !are_tokens(row.left_out, row.left_out_count, v)) return false;
  if (repeats || counts) {
    const int64_t *prompt = row.prompt, *fresh = row.fresh;
    if (!are_tokens(prompt, row.prompt_count, v) || !are_tokens(fresh, row.fresh_count, v)) return false;
    uint32_t* times = room.times.data();
    const auto divide = [&](int64_t id) {
      if (times[id]++ == 0 && repeats) x[id] = x[id] > 0 ? x[id] / row.repetition : x[id] * row.repetition;
    };
    std::for_each(prompt, prompt + row.prompt_count, divide);
    std::for_each(fresh, fresh + row.fresh_count, divide);
    for (int64_t i = 0; i < row.prompt_count; i++) times[prompt[i]] = 0;
    for (int64_t i = 0; i < row.fresh_count; i++) times[fresh[i]] = 0;
    if (counts) {
      for (int64_t i = 0; i < row.fresh_count; i++) times[fresh[i]]++;
      for (int64_t i = 0; i < row.fresh_count; i++) {
        uint32_t& n = times[fresh[i]];
        if (n) x[fresh[i]] += float(-row.presence - row.frequency * n);
        n = 0;
      }
    }
  }
  for (int64_t i = 0; i < row.biased_count; i++) x[row.biased[i]] += row.bias[i];
  for (int64_t i = 0; i < row.left_out_count; i++) x[row.left_out[i]] = -INFINITY;
  return true;
}

// The greatest numbers of lanes and of blocks; the greatest of all, or NaN where one is.
template <int64_t W>
INLINE float most_of(int64_t blocks, Room& room) {
  Floats<W> odd = {};                         // 1 where a number is NaN
  float most = -INFINITY;
  for (int64_t c = 0; c < blocks; c++) {
    Floats<W> greatest = all<W>(-INFINITY);
    for (int64_t i = 0; i < BLOCK; i += W) {
      const Floats<W> x = load<W>(&room.x[c * BLOCK + i]);
      odd = x == x ? odd : all<W>(1);
      greatest = greater(x, greatest);
    }
    std::memcpy(&room.greatest[c * W], &greatest, sizeof greatest);
    room.best[c] = max_of(greatest);
    most = std::max(most, room.best[c]);
  }
  return max_of(odd) > 0 ? NAN : most;
}

// ---------------------------------------------------------------- filters
// The k-th greatest x. NAN where others are NEAR it, as `slack` of x says.
template <int64_t W>
float kth_greatest(int64_t k, float slack, int64_t blocks, Room& room) {
  std::vector<float>& some = room.some;
  float least = -INFINITY;
  const int64_t lanes = blocks * W;
  const float* greatest = room.greatest.data();
  if (k <= lanes) {                        // as many numbers are not below the k-th greatest of the lanes' greatest
    some.assign(greatest, greatest + lanes);
    std::nth_element(some.begin(), some.begin() + (k - 1), some.end(), std::greater<float>());
    least = some[k - 1] - slack;
  }
  some.clear();
  for (int64_t lane = 0; lane < lanes; lane++) {
    if (greatest[lane] < least) continue;
    const float* x = &room.x[lane / W * BLOCK + lane % W];
    for (int64_t i = 0; i < BLOCK; i += W)
      if (x[i] >= least) some.push_back(x[i]);
  }
  std::nth_element(some.begin(), some.begin() + (k - 1), some.end(), std::greater<float>());
  const float kth = some[k - 1];
  const bool is_near = std::any_of(some.begin(), some.end(), [kth, slack](float x) {
    return x != kth && std::abs(x - kth) <= slack;
  });
  return is_near && kth != -INFINITY ? NAN : kth;
}

struct Scale {
  float most, per_t;
  float kth, low;                          // the least x that top_k keeps, and the least that may be drawn
  float least;                             // t, of min_p
  template <class V>
  INLINE V t(V x) const {
    return (x - most) * per_t;
  }
};

Scale scale_of(const Row& row, float most, float kth) {
  Scale s{most, row.per_t, kth, std::max(kth, std::nextafter(row.above, INFINITY)), -INFINITY};
  if (row.min_p <= 0) return s;
  s.least = std::log2(row.min_p);
  const double exact = most + double(s.least) / s.per_t;
  const float x = float(exact);            // t of numbers beside it is off by less than NEAR
  s.low = std::max(s.low, x < exact ? std::nextafter(x, INFINITY) : x);
  return s;
}

struct Sums {
  float kept, mass;                        // of a block: what may be drawn, and what top_k keeps
  bool is_near;                            // to the least of min_p
};

template <int64_t W>
INLINE Sums sums_of(const float* from, const Scale& s) {
  const Floats<W> none = {}, apart = all<W>(-1);
  Floats<W> kept = none, mass = none, nearest = apart;
  for (int64_t i = 0; i < BLOCK; i += W) {
    const Floats<W> x = load<W>(from + i), t = s.t(x), e = power<W>(t), off = t - s.least;
    mass += x >= s.kth ? e : none;
    kept += x >= s.low ? e : none;
    nearest = greater(nearest, t < 0.0f ? -greater(off, -off) : apart);
  }
  return {sum_of(kept), sum_of(mass), max_of(nearest) > -NEAR};
}

// The sum of e over tokens that are likelier than one of x. Below 0 where another is NEAR it.
template <int64_t W>
INLINE double likelier(float than, const Scale& s, int64_t blocks, const Room& room) {
  const Floats<W> none = {}, apart = all<W>(-1);
  Floats<W> nearest = apart;
  double sum = 0;
  for (int64_t c = 0; c < blocks; c++) {
    if (s.t(room.best[c]) < s.t(than) - NEAR) continue;
    Floats<W> sums = none;
    for (int64_t i = 0; i < BLOCK; i += W) {
      const Floats<W> x = load<W>(&room.x[c * BLOCK + i]), t = s.t(x), off = t - s.t(than);
      sums += x > than ? power<W>(t) : none;
      nearest = greater(nearest, x == than ? apart : -greater(off, -off));
    }
    sum += sum_of(sums);
  }
  return max_of(nearest) > -NEAR ? -1 : sum;
}

// ---------------------------------------------------------------- a token
// The place of the greatest score, or UNSURE where the next one is CLOSE.
int64_t greatest_of(const float* scores, int64_t count) {
  const float* first = std::max_element(scores, scores + count);
  for (const float* other = scores; other < scores + count; other++)
    if (other != first && *other >= *first - CLOSE) return UNSURE;
  return *first == -INFINITY ? UNSURE : first - scores;
}

template <int64_t W>
INLINE int64_t drawn(Row& row, int64_t v, int64_t blocks, float most, Room& room) {
  const bool ranks = row.top_k && row.top_k < v, sums_up = row.mass < 0;
  if (!std::isfinite(row.per_t)) return UNSURE;
  const float kth = ranks ? kth_greatest<W>(row.top_k, NEAR / row.per_t, blocks, room) : -INFINITY;
  if (std::isnan(kth)) return UNSURE;
  const Scale s = scale_of(row, most, kth);
  float reached = -INFINITY;               // the score that some block has at least
  for (int64_t c = 0; c < blocks; c++)
    if (room.best[c] >= s.low) reached = std::max(reached, s.t(room.best[c]) * LN2 + row.noise[c]);
  double mass = 0;
  for (int64_t c = 0; c < blocks; c++) {
    const float best = room.best[c], t = s.t(best), most_score = t * LN2 + MOST_OF_BLOCK + row.noise[c];
    const bool is_nobody = t < s.least - NEAR || best < s.low && t > s.least + NEAR || most_score < reached - 2 * CLOSE;
    room.score[c] = -INFINITY;
    if (best < s.kth || t < FAR || (is_nobody && !sums_up)) continue;
    const Sums sums = sums_of<W>(&room.x[c * BLOCK], s);
    mass += sums.mass;
    if (is_nobody) continue;
    if (sums.is_near) return UNSURE;
    if (sums.kept > 0) room.score[c] = std::log(sums.kept) + row.noise[c];
  }
  if (sums_up) row.mass = mass * row.top_p;
  const int64_t block = greatest_of(room.score.data(), blocks);
  if (block < 0) return UNSURE;
  float scores[BLOCK];
  const float *x = &room.x[block * BLOCK], *noise = row.noise + blocks;
  for (int64_t i = 0; i < BLOCK; i++) scores[i] = x[i] >= s.low ? s.t(x[i]) * LN2 + noise[i] : -INFINITY;
  const int64_t place = greatest_of(scores, BLOCK);
  if (place < 0) return UNSURE;
  if (row.mass != INFINITY) {
    const double sum = likelier<W>(x[place], s, blocks, room);
    if (sum < 0 || std::abs(sum - row.mass) <= CLOSE * row.mass) return UNSURE;
    if (sum >= row.mass) {
      row.above = x[place];
      return OUTSIDE;
    }
  }
  return block * BLOCK + place;
}

int64_t first_of(float most, int64_t blocks, const Room& room) {
  const int64_t c = std::find(room.best.begin(), room.best.begin() + blocks, most) - room.best.begin();
  const auto x = room.x.begin() + c * BLOCK;
  return std::find(x, x + BLOCK, most) - room.x.begin();
}

struct Job {
  Row* rows;
  int64_t v;
};

template <int64_t W>
INLINE void run(void* made, int64_t first, int64_t last) {
  const Job& job = *static_cast<Job*>(made);
  const int64_t v = job.v, blocks = (v + BLOCK - 1) / BLOCK;
  thread_local Room room;
  room.x.resize(blocks * BLOCK), room.greatest.resize(blocks * W), room.best.resize(blocks), room.score.resize(blocks);
  room.times.resize(v);
  std::fill(room.x.begin() + v, room.x.end(), -INFINITY);
  for (int64_t i = first; i < last; i++) {
    Row& row = job.rows[i];
    read<W>(row, v, room);
    row.token = UNSURE;
    if (!change(row, v, room)) continue;
    const float most = most_of<W>(blocks, room);
    if (!std::isfinite(most)) continue;
    row.token = row.per_t == 0 ? first_of(most, blocks, room) : drawn<W>(row, v, blocks, most, room);
  }
}

void run_portable(int64_t first, int64_t last, void* job) { run<4>(job, first, last); }
AVX2 void run_avx2(int64_t first, int64_t last, void* job) { run<8>(job, first, last); }
AVX512 void run_avx512(int64_t first, int64_t last, void* job) { run<16>(job, first, last); }

}  // namespace

extern "C" {

// The tokens of rows of v logits, a row of a thread at a time.
void qlab_draw(Row* rows, int64_t count, int64_t v, int64_t path) {
  Job job{rows, v};
  torch_parallel_for(0, count, 1, path == PATH_AVX512 ? run_avx512 : path == PATH_AVX2 ? run_avx2 : run_portable, &job);
}

}
