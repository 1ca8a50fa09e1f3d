// Rotary embedding of the rows that the threads hold (RoFormer, arXiv 2104.09864, section 3.4.2).
#pragma once

#include <cstdint>

#include "../../../core/append_params.h"
#include "row_vectors.cuh"

namespace gqa::cuda::sm80 {

// The index of the angle that rotates `column`, one of the first rotary_dim columns.
__device__ __forceinline__ int angle_of(const AppendParams& params, int column) {
  const int half = static_cast<int>(params.rotary_dim) / 2;
  return params.rotary_interleaved ? column / 2 : column < half ? column : column - half;
}

// Cosines or sines of the angles for `column` and later ones; undefined beyond rotary_dim.
template <class A>
__device__ __forceinline__ void load_angles(const AppendParams& params, const A* row, int column,
                                            bool vectors, Numbers& x) {
  const int first = angle_of(params, column);
  if (vectors && !params.rotary_interleaved) return load_vector(row + first, x);
  if (vectors) {  // half a vector, each number for two columns
    Numbers angles;
    const bool upper = first % kAppendNumbers != 0;
    load_vector(row + first - (upper ? kAppendNumbers / 2 : 0), angles);
#pragma unroll
    for (int i = 0; i < kAppendNumbers; ++i) {
      x[i] = upper ? angles[(i + kAppendNumbers) / 2] : angles[i / 2];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kAppendNumbers; ++i) {
    x[i] = column + i < params.rotary_dim ? to_float(row[angle_of(params, column + i)]) : 0;
  }
}

template <class T>
__device__ __forceinline__ void load_angles(const AppendParams& params, const void* table,
                                            int64_t offset, DType dtype, int column, bool vectors,
                                            Numbers& x) {
  if (dtype == DType::kFloat32) {
    return load_angles(params, static_cast<const float*>(table) + offset, column, vectors, x);
  }
  load_angles(params, static_cast<const T*>(table) + offset, column, vectors, x);
}

// Rotates a and b by one angle. Products are not fused with sums, so that all backends store the
// same.
template <class T>
__device__ __forceinline__ float turned(float a, float b, float cos, float sin) {
  return to_float(rounded_to<T>(__fadd_rn(__fmul_rn(a, cos), __fmul_rn(b, sin))));
}

// Pairs half a turned row apart. kWhole: partners are the same numbers of another thread.
template <class T, bool kWhole>
__device__ __forceinline__ void turn_halves(const float (&staged)[kAppendNumbers][kAppendThreads],
                                            int column, int half, const Numbers& cos,
                                            const Numbers& sin, Numbers& x) {
  const int row = static_cast<int>(threadIdx.x) - column / kAppendNumbers;
  const int partner = row + (column < half ? column + half : column - half) / kAppendNumbers;
#pragma unroll
  for (int i = 0; i < kAppendNumbers; ++i) {
    const int c = column + i;
    if (!kWhole && c >= 2 * half) continue;
    const bool first = (kWhole ? column : c) < half;
    const int p = first ? c + half : c - half;
    const float other =
        kWhole ? staged[i][partner] : staged[p % kAppendNumbers][row + p / kAppendNumbers];
    x[i] = turned<T>(x[i], other, cos[i], first ? -sin[i] : sin[i]);
  }
}

// Turns numbers x, which begin at `column` of a row that threads of one warp hold, this one as the
// row's thread number column / kAppendNumbers; rounded to T. All threads call it, with `turn` where
// their row is to be turned.
template <class T>
__device__ __forceinline__ void rotate(const AppendArgs& args, int64_t position, int column,
                                       bool turn, Numbers& x) {
  // Number i of all threads side by side: no bank conflicts at any distance between partners.
  __shared__ float staged[kAppendNumbers][kAppendThreads];
  const AppendParams& params = args.params;
  if (!params.rotary_interleaved) {
#pragma unroll
    for (int i = 0; i < kAppendNumbers; ++i) staged[i][threadIdx.x] = x[i];
    __syncwarp();  // staged: partners are in the same warp
  }
  const int dim = static_cast<int>(params.rotary_dim), half = dim / 2;
  if (!turn || column >= dim) return;
  const int64_t last = params.rotary_positions - 1;
  const int64_t row = position < 0 ? 0 : position > last ? last : position;
  Numbers cos, sin;
  load_angles<T>(params, params.rotary_cos, row * params.cos_stride, params.cos_dtype, column,
                 args.angle_vectors, cos);
  load_angles<T>(params, params.rotary_sin, row * params.sin_stride, params.sin_dtype, column,
                 args.angle_vectors, sin);
  if (params.rotary_interleaved) {
#pragma unroll
    for (int i = 0; i < kAppendNumbers; i += 2) {
      if (column + i >= dim) continue;
      const float a = x[i], b = x[i + 1];
      x[i] = turned<T>(a, b, cos[i], -sin[i]);
      x[i + 1] = turned<T>(b, a, cos[i], sin[i]);
    }
  } else if (half % kAppendNumbers == 0) {
    turn_halves<T, true>(staged, column, half, cos, sin, x);
  } else {
    turn_halves<T, false>(staged, column, half, cos, sin, x);
  }
}

}  // namespace gqa::cuda::sm80
