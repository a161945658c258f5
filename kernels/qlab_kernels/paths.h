// What a kernel is compiled for more than once, and which of it this processor runs. Paths are numbered as `compiled.PATHS`
// names them.

#pragma once

#include <cstdint>

#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")))

namespace {

enum Path : int64_t { BEST, PORTABLE, PATH_AVX2, PATH_AVX512 };

}  // namespace

// The number of the best path that this processor runs.
extern "C" int64_t qlab_best_path() {
  __builtin_cpu_init();
  const bool wide = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool narrow = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return wide ? PATH_AVX512 : narrow ? PATH_AVX2 : PORTABLE;
}
