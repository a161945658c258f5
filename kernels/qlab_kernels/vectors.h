// Vectors of the compiler's own, of as many numbers as a path of the processor has in one.

#pragma once

#include <cstdint>

template <int64_t N>
struct Vectors;                            // of N numbers; of 8 bytes, as many as are as wide
#define VECTORS(N)                                               \
  template <>                                                    \
  struct Vectors<N> {                                            \
    typedef float Floats __attribute__((vector_size(4 * N)));    \
    typedef int32_t Ints __attribute__((vector_size(4 * N)));    \
    typedef uint16_t Halves __attribute__((vector_size(2 * N))); \
    typedef int8_t Bytes __attribute__((vector_size(N)));        \
    typedef float FirstHalf __attribute__((vector_size(2 * N))); \
    typedef double Doubles __attribute__((vector_size(4 * N)));  \
    typedef int64_t Longs __attribute__((vector_size(4 * N)));   \
  };
VECTORS(4)
VECTORS(8)
VECTORS(16)
