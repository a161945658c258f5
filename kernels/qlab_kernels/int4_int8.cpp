// y [m, n] = x @ W.T on a CPU: W in codes of 4 or 8 bits, x rounded to int8 for every 32 channels of a token.
//
//     x  ~  s_x * a      a in -127..127, one s_x for a block of 32 channels: absmax / 127
//     W  =  s_w * (u - offset - z)      u unsigned, offset 8 for 4 bits and 128 for 8; s_w, z for a group of blocks
//     y  =  sum over blocks of  s_w * s_x * (sum_k u a  -  offset sum_k a  -  z sum_k a)
//
// All sums over k inside of a block are exact integers. Across blocks they are added in fp32, in the order of k.
// A block of x with an inf or a NaN has the scale NaN, so its token's results are NaN. A block whose absmax
// is below 1e-30 is zero.
//
// Words: 16 rows of W stand side by side, because a 32-bit lane of a vector sums four products of one row.
//     8 bits: byte [block][j < 8][row < 16][c < 4] holds channel 4 j + c of the block
//     4 bits: byte [block][j < 4][row < 16][c < 4] holds channel 8 j + c, and 8 j + 4 + c in its high half
// Scales and zeros: [n / 16][group][row < 16].
//
// Names: m tokens, n rows, k channels, b blocks, t a token, MT tokens that share a loaded block of W.

#include "arguments.h"
#include "halves.h"

#include <immintrin.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <sys/syscall.h>
#include <unistd.h>
#include <utility>

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define VNNI __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#define AMX __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,amx-tile,amx-int8")))
#define UNROLL _Pragma("GCC unroll 16")

namespace {

enum Path : int64_t { BEST, PORTABLE, PATH_AVX2, PATH_VNNI, PATH_AMX };

constexpr int64_t BLOCK = 32, ROWS = 16, QUADS = BLOCK / 4;
constexpr int64_t CHUNK = 128;             // most tokens of one task
constexpr int64_t GRAIN = 1 << 16;         // products below which another thread costs more than it gains
constexpr int64_t AHEAD = 4096;            // bytes of W between what is read and what is fetched
constexpr float TINY = 1e-30f;

struct Weight {
  const uint8_t* words;
  const char* scales;
  Kind scale_kind;
  const int8_t* zeros;                     // or null
  int64_t n, blocks, group_blocks, bits;

  int64_t groups() const { return blocks / group_blocks; }
  int64_t row_blocks() const { return (n + ROWS - 1) / ROWS; }
  int64_t block_bytes() const { return ROWS * BLOCK * bits / 8; }
  int64_t offset() const { return int64_t(1) << (bits - 1); }
};

struct Input {
  const char* data;
  Kind kind;
  int64_t m, k, stride_m, stride_k;        // strides in numbers
};

// Rounded: [m / side][blocks][side] of each. The tokens of a tile stand side by side, because rows that are a power of
// two apart, as those of x often are, share few lines of a cache.
struct Tokens {
  int8_t* codes;                           // [32] each
  float* scales;
  int32_t* shifts;                         // -offset * sum of the codes
  int64_t blocks, side;

  int64_t at(int64_t t, int64_t b) const { return (t / side * blocks + b) * side + t % side; }
};

struct Output {
  char* data;
  Kind kind;
  int64_t n;
};

// ---------------------------------------------------------------- rounding of x
// The codes, scale and shift of one block. Magnitudes are compared as integers, where a NaN is the largest.
INLINE void round_block(const float* x, int64_t offset, int8_t* codes, float* scale, int32_t* shift) {
  uint32_t largest = 0;
  for (int i = 0; i < BLOCK; i++) largest = std::max(largest, bits_of(x[i]) & 0x7fffffff);
  const float absmax = from_bits(largest);
  const bool is_finite = largest < 0x7f800000, is_zero = absmax < TINY;
  const float inverse = is_finite && !is_zero ? 127.0f / absmax : 0.0f;
  int32_t sum = 0;
  for (int i = 0; i < BLOCK; i++) {
    // adding 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits
    const float shifted = (is_finite ? x[i] : 0.0f) * inverse + 12582912.0f;
    const int32_t code = int32_t(bits_of(shifted)) - 0x4b400000;
    codes[i] = int8_t(code);
    sum += code;
  }
  *scale = !is_finite ? NAN : is_zero ? 0.0f : absmax / 127.0f;
  *shift = int32_t(-offset) * sum;
}

INLINE void load_any(const Input& x, int64_t t, int64_t first, float* out) {
  for (int64_t i = 0; i < BLOCK; i++) {
    const int64_t channel = first + i;
    out[i] = channel < x.k ? number(x.data, t * x.stride_m + channel * x.stride_k, x.kind) : 0.0f;
  }
}

void load_halves(const char* row, float* out) {
  for (int i = 0; i < BLOCK; i++) out[i] = from_half(reinterpret_cast<const uint16_t*>(row)[i]);
}

AVX2 void load_halves_f16c(const char* row, float* out) {
  for (int i = 0; i < BLOCK; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 2 * i))));
}

template <void HALVES(const char*, float*)>
INLINE void load_whole(const char* row, Kind kind, float* out) {
  if (kind == F32) std::memcpy(out, row, 4 * BLOCK);
  if (kind == F16) HALVES(row, out);
  if (kind == BF16)
    for (int i = 0; i < BLOCK; i++) out[i] = from_bits(uint32_t(reinterpret_cast<const uint16_t*>(row)[i]) << 16);
}

template <void HALVES(const char*, float*)>
INLINE void round_tokens(const Input& x, const Tokens& to, int64_t offset, int64_t begin, int64_t end) {
  float values[BLOCK];
  for (int64_t t = begin; t < end; t++)
    for (int64_t b = 0; b < to.blocks; b++) {
      const int64_t first = b * BLOCK, at = to.at(t, b);
      if (x.stride_k == 1 && first + BLOCK <= x.k)
        load_whole<HALVES>(x.data + (t * x.stride_m + first) * size_of(x.kind), x.kind, values);
      else
        load_any(x, t, first, values);
      round_block(values, offset, to.codes + at * BLOCK, to.scales + at, to.shifts + at);
    }
}

void round_portable(const Input& x, const Tokens& to, int64_t offset, int64_t begin, int64_t end) {
  round_tokens<load_halves>(x, to, offset, begin, end);
}

AVX2 void round_avx2(const Input& x, const Tokens& to, int64_t offset, int64_t begin, int64_t end) {
  round_tokens<load_halves_f16c>(x, to, offset, begin, end);
}

VNNI void round_vnni(const Input& x, const Tokens& to, int64_t offset, int64_t begin, int64_t end) {
  round_tokens<load_halves_f16c>(x, to, offset, begin, end);
}

// ---------------------------------------------------------------- results
INLINE void store_any(const float* from, const Output& y, int64_t t, int64_t row, int64_t count) {
  char* to = y.data + (t * y.n + row) * size_of(y.kind);
  if (y.kind == F32) std::memcpy(to, from, 4 * count);
  uint16_t* halves = reinterpret_cast<uint16_t*>(to);
  if (y.kind == BF16) {
    uint16_t rounded[ROWS];
    for (int i = 0; i < ROWS; i++) rounded[i] = to_bf16(from[i]);
    std::memcpy(halves, rounded, 2 * count);
  }
  if (y.kind == F16)
    for (int i = 0; i < count; i++) halves[i] = to_half(from[i]);
}

void store_portable(const float* from, const Output& y, int64_t t, int64_t row, int64_t count) {
  store_any(from, y, t, row, count);
}

AVX2 void store_avx2(const float* from, const Output& y, int64_t t, int64_t row, int64_t count) {
  if (y.kind != F16) return store_any(from, y, t, row, count);
  uint16_t rounded[ROWS];
  for (int i = 0; i < ROWS; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(rounded + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
  std::memcpy(y.data + (t * y.n + row) * 2, rounded, 2 * count);
}

// ---------------------------------------------------------------- portable: the formula as it stands
INLINE int code_at(const uint8_t* block, int64_t bits, int64_t row, int64_t channel) {
  if (bits == 8) return block[(channel / 4 * ROWS + row) * 4 + channel % 4];
  const uint8_t both = block[(channel / 8 * ROWS + row) * 4 + channel % 4];
  return channel / 4 % 2 ? both >> 4 : both & 15;
}

void tile_portable(const Weight& w, int64_t row_block, const Tokens& x, int64_t t, float* out) {
  for (int64_t row = 0; row < ROWS; row++) {
    out[row] = 0;
    for (int64_t b = 0; b < w.blocks; b++) {
      const int64_t at = x.at(t, b), group = (row_block * w.groups() + b / w.group_blocks) * ROWS + row;
      const uint8_t* block = w.words + (row_block * w.blocks + b) * w.block_bytes();
      int32_t sum = x.shifts[at];
      for (int64_t i = 0; i < BLOCK; i++) sum += code_at(block, w.bits, row, i) * x.codes[at * BLOCK + i];
      if (w.zeros) sum += w.zeros[group] * (x.shifts[at] / int32_t(w.offset()));
      out[row] += float(sum) * x.scales[at] * number(w.scales, group, w.scale_kind);
    }
  }
}

// ---------------------------------------------------------------- AVX2: products of bytes, summed in 16 bits
// maddubs adds two products of u <= 15 and |a| <= 127, and one lane takes the eight of a block:
// 8 * 2 * 15 * 127 = 30480 < 32768, so no 16-bit sum saturates or wraps. Codes of 8 bits are split in halves of 4.
AVX2 INLINE __m256 scales_avx2(const Weight& w, int64_t at) {
  if (w.scale_kind == F32) return _mm256_loadu_ps(reinterpret_cast<const float*>(w.scales) + at);
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.scales + 2 * at));
  if (w.scale_kind == F16) return _mm256_cvtph_ps(halves);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

AVX2 INLINE __m256 zeros_avx2(const Weight& w, int64_t at) {
  const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(w.zeros + at));
  const __m256 zeros = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
  return _mm256_mul_ps(zeros, _mm256_set1_ps(1.0f / float(w.offset())));
}

AVX2 INLINE __m256i four(const int8_t* codes) {
  int32_t word;
  std::memcpy(&word, codes, 4);
  return _mm256_set1_epi32(word);
}

// The sums of a block for eight rows and MT tokens. block: of the eight rows' first bytes.
template <int MT, int BITS>
AVX2 INLINE void dots_avx2(const uint8_t* block, const int8_t* codes, __m256i* sums) {
  const __m256i low_half = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  __m256i low[MT], high[MT];
  for (int t = 0; t < MT; t++) low[t] = high[t] = _mm256_setzero_si256();
  constexpr int LOADS = BITS == 4 ? QUADS / 2 : QUADS;
  for (int j = 0; j < LOADS; j++) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + 4 * ROWS * j));
    const __m256i lo = _mm256_and_si256(both, low_half);
    const __m256i hi = _mm256_and_si256(_mm256_srli_epi16(both, 4), low_half);
    for (int t = 0; t < MT; t++) {
      const int8_t* a = codes + t * BLOCK + (BITS == 4 ? 8 : 4) * j;
      low[t] = _mm256_add_epi16(low[t], _mm256_maddubs_epi16(lo, four(a)));
      __m256i& second = BITS == 4 ? low[t] : high[t];
      second = _mm256_add_epi16(second, _mm256_maddubs_epi16(hi, four(BITS == 4 ? a + 4 : a)));
    }
  }
  for (int t = 0; t < MT; t++) {
    sums[t] = _mm256_madd_epi16(low[t], ones);
    if (BITS == 8) sums[t] = _mm256_add_epi32(sums[t], _mm256_slli_epi32(_mm256_madd_epi16(high[t], ones), 4));
  }
}

template <int MT, int BITS>
AVX2 void tile_avx2(const Weight& w, int64_t row_block, const Tokens& x, int64_t first, float* out) {
  const int64_t bytes = ROWS * BLOCK * BITS / 8;
  for (int half = 0; half < 2; half++) {
    __m256 sums[MT], zeros = _mm256_setzero_ps();
    for (int t = 0; t < MT; t++) sums[t] = _mm256_setzero_ps();
    for (int64_t g = 0; g < w.groups(); g++) {
      const int64_t group = (row_block * w.groups() + g) * ROWS + 8 * half;
      const __m256 scales = scales_avx2(w, group);
      if (w.zeros) zeros = zeros_avx2(w, group);
      for (int64_t b = g * w.group_blocks; b < (g + 1) * w.group_blocks; b++) {
        const int64_t at = x.at(first, b);
        __m256i dots[MT];
        dots_avx2<MT, BITS>(
            w.words + (row_block * w.blocks + b) * bytes + 32 * half, x.codes + at * BLOCK, dots);
        for (int t = 0; t < MT; t++) {
          const __m256i shift = _mm256_set1_epi32(x.shifts[at + t]);
          __m256 dot = _mm256_cvtepi32_ps(_mm256_add_epi32(dots[t], shift));
          if (w.zeros) dot = _mm256_fmadd_ps(zeros, _mm256_cvtepi32_ps(shift), dot);
          sums[t] = _mm256_fmadd_ps(_mm256_mul_ps(dot, _mm256_set1_ps(x.scales[at + t])), scales, sums[t]);
        }
      }
    }
    for (int t = 0; t < MT; t++) _mm256_storeu_ps(out + t * ROWS + 8 * half, sums[t]);
  }
}

// ---------------------------------------------------------------- AVX-512 VNNI: four products of bytes, summed in 32 bits
VNNI INLINE __m512 scales_vnni(const Weight& w, int64_t at) {
  if (w.scale_kind == F32) return _mm512_loadu_ps(reinterpret_cast<const float*>(w.scales) + at);
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w.scales + 2 * at));
  if (w.scale_kind == F16) return _mm512_cvtph_ps(halves);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

VNNI INLINE __m512 zeros_vnni(const Weight& w, int64_t at) {
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.zeros + at));
  return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)), _mm512_set1_ps(1.0f / float(w.offset())));
}

template <int BITS>
VNNI INLINE void unpack_vnni(const uint8_t* block, __m512i* quads) {
  const __m512i low_half = _mm512_set1_epi8(15);
  for (int j = 0; j < QUADS; j += BITS == 4 ? 2 : 1) {
    const __m512i loaded = _mm512_loadu_si512(block + j * 4 * ROWS * BITS / 8);
    if (BITS == 8) {
      quads[j] = loaded;
    } else {
      quads[j] = _mm512_and_si512(loaded, low_half);
      quads[j + 1] = _mm512_and_si512(_mm512_srli_epi16(loaded, 4), low_half);
    }
  }
}

// P: blocks that are summed together, which share the scales of a group.
template <int MT, int BITS, int P>
VNNI INLINE void sums_vnni(const Weight& w, int64_t row_block, const Tokens& x, int64_t first, __m512* sums) {
  constexpr int SIDE = MT < 2 ? MT : 2;    // tokens whose products are made side by side, because each waits for itself
  const int64_t bytes = ROWS * BLOCK * BITS / 8, side = x.side, start = x.at(first, 0);
  const int8_t* codes = x.codes + start * BLOCK;
  const int32_t* shifts = x.shifts + start;
  const float* x_scales = x.scales + start;
  const uint8_t* block = w.words + row_block * w.blocks * bytes;
  __m512 zeros = _mm512_setzero_ps();
  int64_t b = 0;
  for (int64_t g = 0; g < w.groups(); g++) {
    const int64_t group = (row_block * w.groups() + g) * ROWS;
    const __m512 scales = scales_vnni(w, group);
    if (w.zeros) zeros = zeros_vnni(w, group);
    for (const int64_t end = b + w.group_blocks; b < end; b += P, block += P * bytes) {
      if (MT <= 4)                         // the memory is what few tokens wait for
        for (int64_t i = 0; i < P * bytes; i += 64) _mm_prefetch(block + AHEAD + i, _MM_HINT_T0);
      __m512i quads[P][QUADS], dots[SIDE][P], shift[SIDE][P];
      UNROLL for (int p = 0; p < P; p++) unpack_vnni<BITS>(block + p * bytes, quads[p]);
      for (int t = 0; t < MT; t += SIDE) {
        UNROLL for (int i = 0; i < SIDE; i++)
          UNROLL for (int p = 0; p < P; p++) {
            shift[i][p] = _mm512_set1_epi32(shifts[(b + p) * side + t + i]);
            dots[i][p] = shift[i][p];
          }
        UNROLL for (int j = 0; j < QUADS; j++)
          UNROLL for (int i = 0; i < SIDE; i++)
            UNROLL for (int p = 0; p < P; p++) {
              int32_t word;
              std::memcpy(&word, codes + ((b + p) * side + t + i) * BLOCK + 4 * j, 4);
              dots[i][p] = _mm512_dpbusd_epi32(dots[i][p], quads[p][j], _mm512_set1_epi32(word));
            }
        UNROLL for (int i = 0; i < SIDE; i++) {
          __m512 scaled[P];
          UNROLL for (int p = 0; p < P; p++) {
            __m512 exact = _mm512_cvtepi32_ps(dots[i][p]);
            if (w.zeros) exact = _mm512_fmadd_ps(zeros, _mm512_cvtepi32_ps(shift[i][p]), exact);
            const __m512 x_scale = _mm512_set1_ps(x_scales[(b + p) * side + t + i]);
            scaled[p] = p ? _mm512_fmadd_ps(exact, x_scale, scaled[p - 1]) : _mm512_mul_ps(exact, x_scale);
          }
          sums[t + i] = _mm512_fmadd_ps(scaled[P - 1], scales, sums[t + i]);
        }
      }
    }
  }
}

template <int MT, int BITS>
VNNI void tile_vnni(const Weight& w, int64_t row_block, const Tokens& x, int64_t first, float* out) {
  __m512 sums[MT];
  for (int t = 0; t < MT; t++) sums[t] = _mm512_setzero_ps();
  if (w.group_blocks % 2)
    sums_vnni<MT, BITS, 1>(w, row_block, x, first, sums);
  else
    sums_vnni<MT, BITS, 2>(w, row_block, x, first, sums);
  for (int t = 0; t < MT; t++) _mm512_storeu_ps(out + t * ROWS, sums[t]);
}

// ---------------------------------------------------------------- AMX: tiles of 16 tokens and 16 rows
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

constexpr int64_t PIECE = 32;              // blocks of W that are unpacked at a time: they stay in a near cache
constexpr int64_t ALONG = 16;              // tokens of a tile

struct Strip {                             // blocks of 16 rows, codes signed
  alignas(64) int8_t codes[PIECE][QUADS * 4 * ROWS];
  alignas(64) float scales[PIECE][ROWS], zeros[PIECE][ROWS];
};

template <int BITS>
AMX INLINE void unpack_strip(const Weight& w, int64_t row_block, int64_t begin, int64_t count, Strip& strip) {
  const __m512i offset = _mm512_set1_epi8(char(1 << (BITS - 1)));
  int64_t group = (row_block * w.groups() + begin / w.group_blocks) * ROWS;
  int64_t left = w.group_blocks - begin % w.group_blocks;
  for (int64_t b = 0; b < count; b++, left--) {
    if (left == 0) {
      group += ROWS;
      left = w.group_blocks;
    }
    __m512i quads[QUADS];
    unpack_vnni<BITS>(w.words + (row_block * w.blocks + begin + b) * w.block_bytes(), quads);
    for (int j = 0; j < QUADS; j++)
      _mm512_store_si512(strip.codes[b] + 4 * ROWS * j, _mm512_sub_epi8(quads[j], offset));
    _mm512_store_ps(strip.scales[b], scales_vnni(w, group));
    if (w.zeros) _mm512_store_ps(strip.zeros[b], zeros_vnni(w, group));
  }
}

// The sums of one block or of two: [token][row] each.
template <int P>
AMX INLINE void dots_amx(const int8_t* codes, const int8_t* w_codes, int32_t* dots) {
  _tile_zero(0);
  _tile_loadd(1, codes, BLOCK);
  _tile_loadd(2, w_codes, 4 * ROWS);
  _tile_dpbssd(0, 1, 2);
  if (P == 2) {
    _tile_zero(3);
    _tile_loadd(4, codes + ALONG * BLOCK, BLOCK);
    _tile_loadd(5, w_codes + BLOCK * ROWS, 4 * ROWS);
    _tile_dpbssd(3, 4, 5);
  }
  _tile_stored(0, dots, 4 * ROWS);
  if (P == 2) _tile_stored(3, dots + ALONG * ROWS, 4 * ROWS);
}

// Sums of 16 tokens plus those of so many blocks from `start` in x. The tiles of the next blocks are on their way while
// the sums of these are scaled. P: as of sums_vnni, whose order of the sums this is.
template <int P>
AMX INLINE void sums_amx(const Strip& strip, int64_t count, bool has_zeros, const Tokens& x, int64_t start, float* out) {
  const int8_t* codes = x.codes + start * BLOCK;
  const int32_t* shifts = x.shifts + start;
  const float* x_scales = x.scales + start;
  alignas(64) int32_t dots[2][P * ALONG * ROWS];
  __m512 sums[ALONG];
  UNROLL for (int t = 0; t < ALONG; t++) sums[t] = _mm512_loadu_ps(out + t * ROWS);
  dots_amx<P>(codes, strip.codes[0], dots[0]);
  for (int64_t b = 0; b < count; b += P) {
    const int32_t* now = dots[b / P % 2];
    if (b + P < count) dots_amx<P>(codes + (b + P) * ALONG * BLOCK, strip.codes[b + P], dots[1 - b / P % 2]);
    const __m512 scales = _mm512_load_ps(strip.scales[b]), zeros = _mm512_load_ps(strip.zeros[b]);
    UNROLL for (int t = 0; t < ALONG; t++) {
      __m512 scaled[P];
      UNROLL for (int p = 0; p < P; p++) {
        const int64_t at = (b + p) * ALONG + t;
        __m512 exact = _mm512_cvtepi32_ps(_mm512_load_si512(now + (p * ALONG + t) * ROWS));
        if (has_zeros) exact = _mm512_fmadd_ps(zeros, _mm512_cvtepi32_ps(_mm512_set1_epi32(shifts[at])), exact);
        const __m512 x_scale = _mm512_set1_ps(x_scales[at]);
        scaled[p] = p ? _mm512_fmadd_ps(exact, x_scale, scaled[p - 1]) : _mm512_mul_ps(exact, x_scale);
      }
      sums[t] = _mm512_fmadd_ps(scaled[P - 1], scales, sums[t]);
    }
  }
  UNROLL for (int t = 0; t < ALONG; t++) _mm512_storeu_ps(out + t * ROWS, sums[t]);
}

template <int MT, int BITS>
AMX void tile_amx(const Weight& w, int64_t row_block, const Tokens& x, int64_t first, float* out) {
  TileShapes shapes;
  for (int of = 0; of < 6; of += 3) {
    shapes.bytes[of] = 4 * ROWS, shapes.rows[of] = ALONG;        // sums: [token][row] of 32 bits
    shapes.bytes[of + 1] = BLOCK, shapes.rows[of + 1] = ALONG;   // codes of x: [token][32]
    shapes.bytes[of + 2] = 4 * ROWS, shapes.rows[of + 2] = QUADS;  // codes of W: [quad][row][4]
  }
  // GCC 12 takes the instruction for one that reads 8 bytes, and may leave out what is written behind them
  __asm__ volatile("" : : "r"(&shapes) : "memory");
  _tile_loadconfig(&shapes);
  Strip strip;
  std::memset(out, 0, MT * ROWS * sizeof(float));
  for (int64_t b = 0; b < w.blocks; b += PIECE) {
    const int64_t count = std::min(PIECE, w.blocks - b);
    unpack_strip<BITS>(w, row_block, b, count, strip);
    for (int64_t t = 0; t < MT; t += ALONG) {
      const int64_t start = x.at(first + t, b);
      if (w.group_blocks % 2)
        sums_amx<1>(strip, count, w.zeros, x, start, out + t * ROWS);
      else
        sums_amx<2>(strip, count, w.zeros, x, start, out + t * ROWS);
    }
  }
  _tile_release();
}

// ---------------------------------------------------------------- which of them this processor runs
using Tile = void (*)(const Weight&, int64_t, const Tokens&, int64_t, float*);

struct Step {                              // tokens that a tile takes, and the tile for codes of 4 and of 8 bits
  int64_t tokens;
  Tile four, eight;
};

struct Implementation {                    // steps: from the widest tile to that of one token
  void (*round)(const Input&, const Tokens&, int64_t, int64_t, int64_t);
  void (*store)(const float*, const Output&, int64_t, int64_t, int64_t);
  const Step* steps;
  int64_t side;                            // tokens that are stored side by side: no tile has some of two
};

constexpr int64_t WIDEST = 128;
constexpr Step STEPS_PORTABLE[] = {{1, tile_portable, tile_portable}};
constexpr Step STEPS_AVX2[] = {
    {4, tile_avx2<4, 4>, tile_avx2<4, 8>}, {2, tile_avx2<2, 4>, tile_avx2<2, 8>}, {1, tile_avx2<1, 4>, tile_avx2<1, 8>}};
constexpr Step STEPS_AMX[] = {
    {128, tile_amx<128, 4>, tile_amx<128, 8>},
    {64, tile_amx<64, 4>, tile_amx<64, 8>},
    {32, tile_amx<32, 4>, tile_amx<32, 8>},
    {16, tile_amx<16, 4>, tile_amx<16, 8>},
    {12, tile_vnni<12, 4>, tile_vnni<12, 8>},
    {8, tile_vnni<8, 4>, tile_vnni<8, 8>},
    {4, tile_vnni<4, 4>, tile_vnni<4, 8>},
    {2, tile_vnni<2, 4>, tile_vnni<2, 8>},
    {1, tile_vnni<1, 4>, tile_vnni<1, 8>}};

bool has_amx() {
#ifdef __linux__
  uint32_t a = 7, b = 0, c = 0, d = 0;
  __asm__("cpuid" : "+a"(a), "+b"(b), "+c"(c), "+d"(d));
  const uint32_t tile_and_int8 = 3u << 24;
  constexpr long ASK_PERMISSION = 0x1023, TILE_DATA = 18;
  return (d & tile_and_int8) == tile_and_int8 && !syscall(SYS_arch_prctl, ASK_PERMISSION, TILE_DATA);
#else
  return false;
#endif
}

Path best_path() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool vnni = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni");
  return vnni && has_amx() ? PATH_AMX : vnni ? PATH_VNNI : avx2 ? PATH_AVX2 : PORTABLE;
}

Path best() {
  static const Path path = best_path();
  return path;
}

Implementation implementation(int64_t path) {
  switch (path == BEST ? int64_t(best()) : path) {
    case PATH_AMX: return {round_vnni, store_avx2, STEPS_AMX, ALONG};
    case PATH_VNNI: return {round_vnni, store_avx2, STEPS_AMX + 4, 12};
    case PATH_AVX2: return {round_avx2, store_avx2, STEPS_AVX2, 4};
    default: return {round_portable, store_portable, STEPS_PORTABLE, 1};
  }
}

// ---------------------------------------------------------------- the product
struct Rounding {
  const Input& x;
  const Tokens& tokens;
  const Implementation& path;
  int64_t offset;
};

void round_some(int64_t begin, int64_t end, void* of) {
  const Rounding& job = *static_cast<const Rounding*>(of);
  job.path.round(job.x, job.tokens, job.offset, begin, end);
}

struct Job {
  int64_t m;
  const Weight& w;
  const Output& y;
  const Tokens& tokens;
  const Implementation& path;
  int64_t chunks;

  // where a chunk begins: all have as many sides of tokens, but for one
  int64_t begin(int64_t chunk) const {
    const int64_t sides = (m + tokens.side - 1) / tokens.side;
    return std::min(m, sides * chunk / chunks * tokens.side);
  }
};

void multiply_some(int64_t begin, int64_t end, void* of) {
  const Job& job = *static_cast<const Job*>(of);
  alignas(64) float out[WIDEST * ROWS];
  for (int64_t task = begin; task < end; task++) {
    // a chunk of x stays in a core's cache while all rows of W pass
    const int64_t chunk = task / job.w.row_blocks(), row_block = task % job.w.row_blocks(), row = row_block * ROWS;
    const int64_t count = std::min(ROWS, job.w.n - row);
    const int64_t last = job.begin(chunk + 1);
    const Step* step = job.path.steps;
    for (int64_t t = job.begin(chunk); t < last; t += step->tokens) {
      while (step->tokens > last - t) step++;
      (job.w.bits == 4 ? step->four : step->eight)(job.w, row_block, job.tokens, t, out);
      for (int64_t i = 0; i < step->tokens; i++) job.path.store(out + i * ROWS, job.y, t + i, row, count);
    }
  }
}

// x rounded for weights of so many blocks and of this offset.
struct Rounded {
  std::unique_ptr<char, decltype(&std::free)> room{nullptr, std::free};
  Tokens tokens;

  Rounded(const Input& x, const Weight& w, const Implementation& path) {
    const int64_t side = std::max<int64_t>(1, std::min(x.m, path.side));
    const int64_t blocks = (x.m + side - 1) / side * side * w.blocks;
    const size_t bytes = blocks * (BLOCK + sizeof(float) + sizeof(int32_t));
    room.reset(static_cast<char*>(std::malloc(bytes + 64)));
    char* aligned = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(room.get()) + 63) & ~uintptr_t(63));
    tokens = {reinterpret_cast<int8_t*>(aligned), reinterpret_cast<float*>(aligned + blocks * BLOCK), nullptr, w.blocks, side};
    tokens.shifts = reinterpret_cast<int32_t*>(tokens.scales + blocks);
    Rounding job{x, tokens, path, w.offset()};
    torch_parallel_for(0, x.m, std::max<int64_t>(1, GRAIN / 8 / (w.blocks * BLOCK)), round_some, &job);
  }
};

void multiply(int64_t m, const Tokens& tokens, const Weight& w, const Output& y, const Implementation& path) {
  if (m == 0 || w.n == 0) return;
  Job job{m, w, y, tokens, path, (m + CHUNK - 1) / CHUNK};
  const int64_t task_products = ROWS * w.blocks * BLOCK * std::min(m, CHUNK);
  torch_parallel_for(0, w.row_blocks() * job.chunks, std::max<int64_t>(1, GRAIN / task_products), multiply_some, &job);
}

void multiply(const Input& x, const Weight& w, const Output& y, int64_t path) {
  if (x.m == 0 || w.n == 0) return;
  const Implementation chosen = implementation(path);
  multiply(x.m, Rounded(x, w, chosen).tokens, w, y, chosen);
}

// ---------------------------------------------------------------- as torch's operators
Weight weight(const Argument& words, const Argument& scales, const Argument& zeros, int64_t axis, int64_t n, int64_t group) {
  const char* none = zeros.size(0) ? zeros.data() : nullptr;
  return {
      reinterpret_cast<const uint8_t*>(words.data()),
      scales.data(),
      kind_of(scales),
      reinterpret_cast<const int8_t*>(none),
      n,
      words.size(axis),
      group / BLOCK,
      words.size(axis + 1) * 8 / (ROWS * BLOCK)};
}

// int4_int8_mm(Tensor x, Tensor words, Tensor scales, Tensor zeros, int n, int group, int path) -> Tensor
void boxed_mm(StableIValue* stack, uint64_t, uint64_t) {
  const Argument x(stack[0]), words(stack[1]), scales(stack[2]), zeros(stack[3]);
  const int64_t n = int64_t(stack[4]), group = int64_t(stack[5]), path = int64_t(stack[6]);
  AtenTensorHandle y = empty({x.size(0), n}, x.dtype());
  const Input input{x.data(), kind_of(x), x.size(0), x.size(1), x.stride(0), x.stride(1)};
  multiply(input, weight(words, scales, zeros, 1, n, group), {data_of(y), kind_of(x), n}, path);
  stack[0] = value_of(y);
}

struct Parts {
  Argument words, scales, zeros;
  explicit Parts(const StableIValue* of) : words(of[0]), scales(of[1]), zeros(of[2]) {}
};

// int4_int8_pair, int4_int8_triple(Tensor x, words, scales, zeros of each weight, int n of each, int group, int path)
// -> Tensor of each. x is rounded once, for weights of one number of bits.
template <size_t... EACH>
void boxed_joined(StableIValue* stack, std::index_sequence<EACH...>) {
  constexpr size_t COUNT = sizeof...(EACH);
  const Argument x(stack[0]);
  const Parts parts[COUNT] = {Parts(stack + 1 + 3 * EACH)...};
  const StableIValue* last = stack + 1 + 3 * COUNT;
  const int64_t group = int64_t(last[COUNT]);
  const Weight weights[COUNT] = {weight(parts[EACH].words, parts[EACH].scales, parts[EACH].zeros, 1, int64_t(last[EACH]), group)...};
  const Implementation path = implementation(int64_t(last[COUNT + 1]));
  const Input input{x.data(), kind_of(x), x.size(0), x.size(1), x.stride(0), x.stride(1)};
  const Rounded rounded(input, weights[0], path);
  for (size_t i = 0; i < COUNT; i++) {
    AtenTensorHandle y = empty({input.m, weights[i].n}, x.dtype());
    multiply(input.m, rounded.tokens, weights[i], {data_of(y), input.kind, weights[i].n}, path);
    stack[i] = value_of(y);
  }
}

void boxed_pair(StableIValue* stack, uint64_t, uint64_t) { boxed_joined(stack, std::make_index_sequence<2>()); }
void boxed_triple(StableIValue* stack, uint64_t, uint64_t) { boxed_joined(stack, std::make_index_sequence<3>()); }

// int4_int8_grouped_mm(Tensor x, Tensor words, Tensor scales, Tensor zeros, Tensor ends, int n, int group, int path)
// -> Tensor: rows ends[e - 1] to ends[e] by the weight of expert e; ends int64 [e], contiguous.
void boxed_grouped_mm(StableIValue* stack, uint64_t, uint64_t) {
  const Argument x(stack[0]), words(stack[1]), scales(stack[2]), zeros(stack[3]), ends(stack[4]);
  const int64_t n = int64_t(stack[5]), group = int64_t(stack[6]), path = int64_t(stack[7]);
  AtenTensorHandle y = empty({x.size(0), n}, x.dtype());
  Weight w = weight(words, scales, zeros, 2, n, group);
  const int64_t numbers = w.row_blocks() * w.groups() * ROWS, size = size_of(kind_of(x));
  const int64_t* last = reinterpret_cast<const int64_t*>(ends.data());
  for (int64_t e = 0, first = 0; e < words.size(0); first = last[e++]) {
    const Input rows{x.data() + first * x.stride(0) * size, kind_of(x), last[e] - first, x.size(1), x.stride(0), x.stride(1)};
    multiply(rows, w, {data_of(y) + first * n * size, kind_of(x), n}, path);
    w.words += w.row_blocks() * w.blocks * w.block_bytes();
    w.scales += numbers * size_of(w.scale_kind);
    w.zeros += w.zeros ? numbers : 0;
  }
  stack[0] = value_of(y);
}

}  // namespace

// The fastest path of this processor, as a number of `Path`.
extern "C" int64_t qlab_best_path() { return best(); }

extern "C" int32_t qlab_register() {
  return given_to_torch({
    {"int4_int8_mm", boxed_mm},
    {"int4_int8_forward", boxed_mm},
    {"int4_int8_pair", boxed_pair},
    {"int4_int8_triple", boxed_triple},
    {"int4_int8_grouped_mm", boxed_grouped_mm},
  });
}
