// Converts eight numbers of a row between memory and fp32, by vector accesses if the row is
// aligned.
#pragma once

#include <cstdint>

#include "../../../core/params.h"
#include "../../common/mma.cuh"
#include "../../common/ptx.cuh"
#include "args.h"

namespace gqa::cuda::sm80 {

using Numbers = float[kAppendNumbers];

__device__ __forceinline__ float to_float(float x) { return x; }
using cuda::to_float;

template <class T>
__device__ __forceinline__ T rounded_to(float x) {
  return T{static_cast<uint16_t>(pack<T>(x, 0.0f))};
}
template <>
__device__ __forceinline__ float rounded_to<float>(float x) {
  return x;
}

__device__ __forceinline__ void load_vector(const float* from, Numbers& x) {
#pragma unroll
  for (int i = 0; i < kAppendNumbers; i += 4) {
    const uint4 words = ld_global_v4(from + i);
    x[i] = __uint_as_float(words.x), x[i + 1] = __uint_as_float(words.y);
    x[i + 2] = __uint_as_float(words.z), x[i + 3] = __uint_as_float(words.w);
  }
}
template <class T>
__device__ __forceinline__ void load_vector(const T* from, Numbers& x) {
  const uint4 v = ld_global_v4(from);
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < kAppendNumbers; ++i) {
    x[i] = to_float(T{static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16))});
  }
}

// Numbers of a row of `dim` from `column` on; 0 beyond its end.
template <class T>
__device__ __forceinline__ void load_numbers(const T* row, int column, int dim, bool vectors,
                                             Numbers& x) {
  if (vectors && column + kAppendNumbers <= dim) return load_vector(row + column, x);
#pragma unroll
  for (int i = 0; i < kAppendNumbers; ++i) x[i] = column + i < dim ? to_float(row[column + i]) : 0;
}

__device__ __forceinline__ void store_vector(float* to, const Numbers& x) {
#pragma unroll
  for (int i = 0; i < kAppendNumbers; i += 4) {
    st_global_v4(to + i, x[i], x[i + 1], x[i + 2], x[i + 3]);
  }
}
template <class T>
__device__ __forceinline__ void store_vector(T* to, const Numbers& x) {
  st_global_v4(to, make_uint4(pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]),
                              pack<T>(x[6], x[7])));
}

template <class T>
__device__ __forceinline__ void store_numbers(T* row, int column, int dim, bool vectors,
                                              const Numbers& x) {
  if (vectors && column + kAppendNumbers <= dim) return store_vector(row + column, x);
#pragma unroll
  for (int i = 0; i < kAppendNumbers; ++i) {
    if (column + i < dim) row[column + i] = rounded_to<T>(x[i]);
  }
}

// The eight bytes, or of two numbers a byte the four, that are stored for `column` of a row of
// `dim` numbers; byte 0 is the lowest of words[0].
template <int kNumbersPerByte>
__device__ __forceinline__ void store_bytes(uint8_t* row, int column, int dim, bool vectors,
                                            const uint32_t (&words)[2]) {
  uint8_t* to = row + column / kNumbersPerByte;
  if (vectors && column + kAppendNumbers <= dim) {
    if (kNumbersPerByte == 1) return st_global_v2(to, words[0], words[1]);
    *reinterpret_cast<uint32_t*>(to) = words[0];
    return;
  }
#pragma unroll
  for (int i = 0; i < kAppendNumbers / kNumbersPerByte; ++i) {
    if (column + i * kNumbersPerByte < dim)
      to[i] = static_cast<uint8_t>(words[i / 4] >> (i % 4 * 8));
  }
}

}  // namespace gqa::cuda::sm80
