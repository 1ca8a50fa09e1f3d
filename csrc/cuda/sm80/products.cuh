// The two kinds of matrix products that attention is made of, for one warp: rows times rows, as in
// S = Q K^T, and weights times rows, as in O += P V. The weights, made from results of the first,
// are the second's first operand as they lie in registers.
#pragma once

#include <cstdint>

#include "../common/mma.cuh"
#include "../common/ptx.cuh"
#include "shared_tile.cuh"

namespace gqa::cuda::sm80 {

// Accumulators of a warp's kRowTiles x 16 rows: element [m][n][2 * h + e] of lane l is row
// m * 16 + h * 8 + l / 4, column n * 8 + 2 * (l % 4) + e.
template <class C>
using Scores = float[C::kRowTiles][C::kBlockN / 8][4];
// P, rounded, as the first operand of the second product: [m][step of 16 columns][register].
template <class C>
using Probabilities = uint32_t[C::kRowTiles][C::kBlockN / 16][4];
template <class C>
using Output = float[C::kRowTiles][C::kD / 8][4];

// scores = rows x tile^T, over the kBlockN rows of `tile` (LaneOffsets::k). `load_rows(a, m, step)`
// loads the warp's rows m * 16 and on, columns step * 16 and on, as a first operand.
template <class T, class C, class LoadRows>
__device__ __forceinline__ void multiply_rows(Scores<C>& scores, const LoadRows& load_rows,
                                              const TileFragments& tile) {
#pragma unroll
  for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < C::kBlockN / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[m][n][i] = 0.0f;
    }
  }
#pragma unroll
  for (int step = 0; step < C::kD / 16; ++step) {
    uint32_t a[C::kRowTiles][4];
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m) load_rows(a[m], m, step);
#pragma unroll
    for (int n = 0; n < C::kBlockN / 16; ++n) {
      uint32_t b[4];  // rows 0-7: columns 0-7, 8-15; rows 8-15: the same
      ldmatrix_x4(b, tile.address<C>(n * 16, step));
#pragma unroll
      for (int m = 0; m < C::kRowTiles; ++m) {
        mma_16816<T>(scores[m][2 * n], a[m], b[0], b[1]);
        mma_16816<T>(scores[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// output += p x tile, over the kBlockN rows of `tile` (LaneOffsets::qv).
template <class T, class C>
__device__ __forceinline__ void add_weighted_rows(Output<C>& output, const Probabilities<C>& p,
                                                  const TileFragments& tile) {
#pragma unroll
  for (int step = 0; step < C::kBlockN / 16; ++step) {
#pragma unroll
    for (int d = 0; d < C::kD / 16; ++d) {
      uint32_t b[4];  // columns 0-7: rows 0-7, 8-15; columns 8-15: the same
      ldmatrix_x4_trans(b, tile.address<C>(step * 16, d));
#pragma unroll
      for (int m = 0; m < C::kRowTiles; ++m) {
        mma_16816<T>(output[m][2 * d], p[m][step], b[0], b[1]);
        mma_16816<T>(output[m][2 * d + 1], p[m][step], b[2], b[3]);
      }
    }
  }
}

}  // namespace gqa::cuda::sm80
