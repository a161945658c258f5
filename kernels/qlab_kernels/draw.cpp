// A token for each row of logits on a CPU: what `qlab/generation/drawing.py` computes in a dozen passes, in two over the
// row and some over the parts that matter.
//
//     x = logits less penalties, plus biases; -inf for tokens that are left out
//     token = argmax x                                    where there is no temperature
//     t = (x - max x) log2(e) / T,  e = 2^t               else; 0 where a filter leaves the token out
//     block = argmax_c (log sum_{i in c} e_i + noise_c)
//     token = argmax_{i in block} (log e_i + noise_i)
//
// And what is told of tokens, of logits as they are:
//
//     log p_i = (x_i - max x) - log sum_j exp(x_j - max x)    in fp64, rounded once to fp32
//     the likeliest: the greatest x first, of equal ones the first in the row
//
// x and t have the reference's bits; sums and exponentials have not. Wherever the answer hangs on less than their errors
// (two tokens NEAR each other at the edge of a filter, two scores CLOSE to each other, sums CLOSE to the mass of a
// nucleus), and for rows without a finite greatest number, the row is UNSURE: the reference has to say. So its token is what
// comes, always.
//
// Names: v tokens of the vocabulary, W the numbers of a vector, lane each of them.

#include "logits.h"
#include "paths.h"

#include <torch/csrc/stable/c/shim.h>

#define FUSED __attribute__((optimize("fp-contract=fast")))  // products with sums, where no bits have to be a reference's

namespace {

constexpr float MAGIC = 0x1.8p23f;         // adding it rounds to an integer
constexpr double DOUBLE_MAGIC = 0x1.8p52;
constexpr float NEAR = 1e-5f;              // of t: exponentials are off by 2.6e-6 of themselves, torch's by 1e-7
constexpr float TIED = 5e-7f;              // of t: torch's exponentials may be equal, each off by 1.2e-7 of itself at most
constexpr float CLOSE = 1e-4f;             // of scores, whose sums and logarithms are off by less than 2e-5
constexpr float FAR = -44.0f;              // of t: noise lies in [-2.9, 16.7], and no block has 2^10 times its greatest e
constexpr double LOG2_E = 1.4426950408889634;
constexpr float LN2 = 0.69314718f, MOST_OF_BLOCK = 6.24f;  // log BLOCK
enum Answer : int64_t { UNSURE = -1, OUTSIDE = -2 };

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

struct Room : Logits {                     // of one thread
  std::vector<float> score, some;          // [blocks], a few numbers
  std::vector<uint32_t> times;             // [v] of a token so far; all 0 between rows
  std::vector<int64_t> found;              // a few places
};

// 2^t of t <= 0, and about 2^-100 below that: 2^n p(r) with r in [-1/2, 1/2], p of the least relative error
template <int64_t W>
INLINE Floats<W> power(Floats<W> t) {
  t = t > -100.0f ? t : all<W>(-100.0f);
  const Floats<W> n = t + MAGIC, r = t - (n - MAGIC);
  const Floats<W> p = (((9.5701e-3f * r + 5.591786e-2f) * r + 2.4024745e-1f) * r + 6.9312181e-1f) * r + 9.9999926e-1f;
  return (Floats<W>)((Ints<W>)p + ((Ints<W>)n << 23));
}

// ---------------------------------------------------------------- x
bool are_tokens(const int64_t* ids, int64_t count, int64_t v) {
  return std::all_of(ids, ids + count, [v](int64_t id) { return id >= 0 && id < v; });
}

bool repeats(const Row& row) { return row.repetition != 1.0f; }
bool counts(const Row& row) { return row.presence != 0 || row.frequency != 0; }
bool is_changed(const Row& row) { return repeats(row) || counts(row) || row.biased_count || row.left_out_count; }

// Penalties, biases, and what is left out. False for ids that are no tokens.
bool change(const Row& row, int64_t v, Room& room) {
  float* x = room.x.data();
  if (!are_tokens(row.biased, row.biased_count, v) || !are_tokens(row.left_out, row.left_out_count, v)) return false;
  if (repeats(row) || counts(row)) {
    const int64_t *prompt = row.prompt, *fresh = row.fresh;
    if (!are_tokens(prompt, row.prompt_count, v) || !are_tokens(fresh, row.fresh_count, v)) return false;
    uint32_t* times = room.times.data();
    const auto divide = [&](int64_t id) {
      if (times[id]++ == 0 && repeats(row)) x[id] = x[id] > 0 ? x[id] / row.repetition : x[id] * row.repetition;
    };
    std::for_each(prompt, prompt + row.prompt_count, divide);
    std::for_each(fresh, fresh + row.fresh_count, divide);
    for (int64_t i = 0; i < row.prompt_count; i++) times[prompt[i]] = 0;
    for (int64_t i = 0; i < row.fresh_count; i++) times[fresh[i]] = 0;
    if (counts(row)) {
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

// ---------------------------------------------------------------- filters
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

// The k-th greatest x. NAN where a lesser one is TIED with it.
template <int64_t W>
INLINE float kept_least(int64_t k, float most, float per_t, Room& room) {
  Ranked found;
  if (are_few<W>(k, room)) {
    std::vector<float>& some = room.some;
    some.clear();
    each_not_below<W>(bound<W>(k, most, room) - NEAR / per_t, room, [&](int64_t i) { some.push_back(room.x[i]); });
    some.resize((some.size() + W - 1) / W * W, -INFINITY);
    found = ranked<W>(k, most, some.data(), some.size());
  } else found = ranked<W>(k, most, room);
  // what is greater than the k-th is as likely at least, and kept
  const float t = (found.kth - most) * per_t, next = (found.next - most) * per_t;
  return t - next <= TIED ? NAN : found.kth;
}

struct Sums {
  float kept, mass;                        // of a block: what may be drawn, and what top_k keeps
};

template <int64_t W>
INLINE Sums sums_of(const float* from, const Scale& s) {
  const Floats<W> none = {};
  Floats<W> kept = none, mass = none;
  for (int64_t i = 0; i < BLOCK; i += W) {
    const auto x = load<Floats<W>>(from + i), e = power<W>(s.t(x));
    mass += x >= s.kth ? e : none;
    kept += x >= s.low ? e : none;
  }
  return {sum_of(kept), sum_of(mass)};
}

// Whether a number of a block is NEAR the least of min_p, but for the greatest of all, which is kept.
template <int64_t W>
INLINE bool is_near_least(const float* from, const Scale& s) {
  const Floats<W> apart = all<W>(-1);
  Floats<W> nearest = apart;
  for (int64_t i = 0; i < BLOCK; i += W) {
    const Floats<W> t = s.t(load<Floats<W>>(from + i));
    nearest = greater(nearest, t < 0.0f ? -size_of(t - s.least) : apart);
  }
  return max_of(nearest) > -NEAR;
}

// The sum of e over tokens that are likelier than one of x. Below 0 where another is NEAR it.
template <int64_t W>
INLINE double likelier(float than, const Scale& s, const Room& room) {
  const Floats<W> none = {}, apart = all<W>(-1);
  Floats<W> nearest = apart;
  double sum = 0;
  for (int64_t c = 0; c < room.blocks; c++) {
    if (s.t(room.best[c]) < s.t(than) - NEAR) continue;
    Floats<W> sums = none;
    for (int64_t i = 0; i < BLOCK; i += W) {
      const auto x = load<Floats<W>>(&room.x[c * BLOCK + i]);
      const Floats<W> t = s.t(x), off = t - s.t(than);
      sums += x > than ? power<W>(t) : none;
      nearest = greater(nearest, x == than ? apart : -size_of(off));
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
INLINE int64_t drawn(Row& row, int64_t v, float most, Room& room) {
  const int64_t blocks = room.blocks;
  const bool ranks = row.top_k && row.top_k < v, sums_up = row.mass < 0;
  if (!std::isfinite(row.per_t)) return UNSURE;
  const float kth = ranks ? kept_least<W>(row.top_k, most, row.per_t, room) : -INFINITY;
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
    if (s.least != -INFINITY && is_near_least<W>(&room.x[c * BLOCK], s)) return UNSURE;
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
    const double sum = likelier<W>(x[place], s, room);
    if (sum < 0 || std::abs(sum - row.mass) <= CLOSE * row.mass) return UNSURE;
    if (sum >= row.mass) {
      row.above = x[place];
      return OUTSIDE;
    }
  }
  return block * BLOCK + place;
}

// ---------------------------------------------------------------- what is told of tokens
struct Told {                              // as `draw.py` fills it in
  const void* logits;                      // rows of v numbers side by side
  int64_t kind, stride, v;
  const int64_t *rows, *tokens, *counts;   // of each answer: its row, whose log-probability, of how many likeliest ones
  int64_t most;                            // of the counts
  float* own;                              // of each token; NaN where the reference has to say
  int64_t* places;                         // [most] of each, the likeliest first, of equal ones the first in the row
  float* logprobs;                         // [most] of each
};

// 2^t of t <= 0, off by 3e-12 of itself, and 2^-1000 below that
template <int64_t W>
INLINE Doubles<W> exact_power(Doubles<W> t) {
  constexpr double P[] = {1, 0.6931471805568324, 0.24022650695888503, 0.055504109063258665, 0.00961812913523614,
                          0.0013333478473685416, 0.00015403475186530786, 1.5303700711365693e-05, 1.325080551750225e-06};
  t = t > -1000.0 ? t : Doubles<W>{} - 1000.0;
  const Doubles<W> n = t + DOUBLE_MAGIC, r = t - (n - DOUBLE_MAGIC), r2 = r * r;
  Doubles<W> p = Doubles<W>{} + P[8];
  for (int64_t i = 6; i >= 0; i -= 2) p = p * r2 + (P[i + 1] * r + P[i]);
  using Longs = typename Vectors<W>::Longs;
  return (Doubles<W>)((Longs)p + ((Longs)n << 52));
}

// log sum_i exp(x_i - most): the greatest one is 1, and the others are summed up without it, so that their digits last.
template <int64_t W>
INLINE double log_sum(float most, Logits& logits) {
  float& first = logits.x[first_of(most, logits)];
  first = -INFINITY;
  Doubles<W> sums = {};
  for (int64_t i = 0; i < logits.blocks * BLOCK; i += W / 2) {
    const auto x = load<typename Vectors<W>::FirstHalf>(&logits.x[i]);
    sums += exact_power<W>((__builtin_convertvector(x, Doubles<W>) - double(most)) * LOG2_E);
  }
  first = most;
  double sum = 0;
  for (int64_t lane = 0; lane < W / 2; lane++) sum += sums[lane];
  return std::log1p(sum);
}

template <int64_t W>
INLINE void tell(const Told& told, int64_t i, Room& room) {
  const int64_t token = told.tokens[i], count = told.counts[i], first = told.rows[i] * told.stride;
  const void* from = static_cast<const char*>(told.logits) + first * (told.kind == F32 ? 4 : 2);
  const float most = read<W>(from, told.kind, told.v, room);
  told.own[i] = NAN;
  if (!std::isfinite(most) || token < 0 || token >= told.v) return;
  const double sum = log_sum<W>(most, room);
  const float* x = room.x.data();
  const auto logprob = [=](int64_t place) { return float((double(x[place]) - most) - sum) + 0.0f; };  // not -0
  told.own[i] = logprob(token);
  if (count == 0) return;
  std::vector<int64_t>& found = room.found;
  found.clear();
  each_not_below<W>(bound<W>(count, most, room), room, [&](int64_t place) { found.push_back(place); });
  std::partial_sort(found.begin(), found.begin() + count, found.end(), [x](int64_t one, int64_t other) {
    return x[one] > x[other] || x[one] == x[other] && one < other;
  });
  for (int64_t j = 0; j < count; j++) {
    told.places[i * told.most + j] = found[j];
    told.logprobs[i * told.most + j] = logprob(found[j]);
  }
}

// ---------------------------------------------------------------- rows, each by one thread
struct Job {
  Row* rows;
  int64_t v;
};

template <int64_t W>
INLINE Room& room_of(int64_t v) {
  thread_local Room room;
  room.resize<W>(v), room.score.resize(room.blocks), room.times.resize(v);
  return room;
}

template <int64_t W>
INLINE void run_draws(void* made, int64_t first, int64_t last) {
  const Job& job = *static_cast<Job*>(made);
  Room& room = room_of<W>(job.v);
  for (int64_t i = first; i < last; i++) {
    Row& row = job.rows[i];
    float most = read<W>(row.logits, row.kind, job.v, room);
    row.token = UNSURE;
    if (is_changed(row)) most = change(row, job.v, room) ? most_of<W>(room) : NAN;
    if (!std::isfinite(most)) continue;
    row.token = row.per_t == 0 ? first_of(most, room) : drawn<W>(row, job.v, most, room);
  }
}

template <int64_t W>
INLINE void run_told(void* made, int64_t first, int64_t last) {
  const Told& told = *static_cast<Told*>(made);
  Room& room = room_of<W>(told.v);
  for (int64_t i = first; i < last; i++) tell<W>(told, i, room);
}

#define ON_PATHS(NAME, AS)                                                                            \
  AS void NAME##_portable(int64_t first, int64_t last, void* job) { NAME<4>(job, first, last); }      \
  AS AVX2 void NAME##_avx2(int64_t first, int64_t last, void* job) { NAME<8>(job, first, last); }     \
  AS AVX512 void NAME##_avx512(int64_t first, int64_t last, void* job) { NAME<16>(job, first, last); } \
  void NAME(int64_t count, int64_t path, void* job) {                                                 \
    const auto run = path == PATH_AVX512 ? NAME##_avx512 : path == PATH_AVX2 ? NAME##_avx2 : NAME##_portable; \
    torch_parallel_for(0, count, 1, run, job);                                                        \
  }
ON_PATHS(run_draws, )
ON_PATHS(run_told, FUSED)

}  // namespace

extern "C" {

// The tokens of rows of v logits.
void qlab_draw(Row* rows, int64_t count, int64_t v, int64_t path) {
  Job job{rows, v};
  run_draws(count, path, &job);
}

// Log-probabilities of tokens, and of the likeliest ones.
void qlab_tell(Told* told, int64_t count, int64_t path) { run_told(count, path, told); }

}
