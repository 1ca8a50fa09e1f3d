// The two matrix products of a warp: S = Q K^T and O += P V.
#pragma once

#include <cstdint>

#include "../../common/mma.cuh"
#include "../../common/ptx.cuh"
#include "config.h"

namespace gqa::cuda::sm80 {

// Accumulators of a warp's kRowTiles x 16 rows: element [m][n][2 * h + e] of lane l is row
// m * 16 + h * 8 + l / 4, column n * 8 + 2 * (l % 4) + e.
template <class C>
using Scores = float[C::kRowTiles][C::kBlockN / 8][4];
// P, rounded, as the first operand of the second product: [m][step of 16 keys][register].
template <class C>
using Probabilities = uint32_t[C::kRowTiles][C::kBlockN / 16][4];
template <class C>
using Output = float[C::kRowTiles][C::kD / 8][4];
// Q as the first operand, where it stays in registers.
template <class C>
using QFragments = uint32_t[C::kQInRegisters ? C::kD / 16 : 1][C::kRowTiles][4];

// Addresses for ldmatrix within a tile: 16 x 16 elements at a row (a multiple of 16) and a step of
// 16 columns, whose four 8 x 8 matrices must land in the order of mma's operands, because mma takes
// neighbouring registers. Q and V (transposed): lane l gives row l % 16 and chunk 2 * step + l
// / 16. K: row l / 16 * 8 + l % 8 and chunk 2 * step + l / 8 % 2. The swizzled chunk, (2 * step +
// c) ^ (row % 8) = 2 * step ^ c ^ (row % 8), repeats every four steps 128 bytes further on. So a
// lane keeps the offset of step 0, and the rest is immediate.
template <class C>
struct LaneOffsets {
  uint32_t k, qv;

  __device__ __forceinline__ LaneOffsets() {
    const uint32_t lane = threadIdx.x % 32, x = lane % 8;
    const auto offset = [&](uint32_t row, uint32_t chunk) {
      return row * C::kRowBytes + ((chunk ^ x) << 4);
    };
    k = offset(lane / 16 * 8 + x, lane / 8 % 2);
    qv = offset(lane % 16, lane / 16);
  }
};

struct TileFragments {
  uint32_t at[4];  // of steps 0 to 3

  // `tile` is a multiple of 128.
  __device__ __forceinline__ TileFragments(uint32_t tile, uint32_t lane_offset) {
#pragma unroll
    for (int i = 0; i < 4; ++i) at[i] = (tile + lane_offset) ^ (i << 5);
  }
  template <class C>
  __device__ __forceinline__ uint32_t address(int row, int step) const {
    return at[step % 4] + row * C::kRowBytes + step / 4 * 128;
  }
};

// `q_tile`: the warp's rows in shared memory, where `q` is not used.
template <class T, class C>
__device__ __forceinline__ void multiply_qk(Scores<C>& scores, const QFragments<C>& q,
                                            const TileFragments& q_tile,
                                            const TileFragments& k_tile) {
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
    for (int m = 0; m < C::kRowTiles; ++m) {
      if constexpr (C::kQInRegisters) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[m][i] = q[step][m][i];
      } else {
        ldmatrix_x4(a[m], q_tile.address<C>(m * 16, step));
      }
    }
#pragma unroll
    for (int n = 0; n < C::kBlockN / 16; ++n) {
      uint32_t b[4];  // keys 0-7: columns 0-7, 8-15; keys 8-15: the same
      ldmatrix_x4(b, k_tile.address<C>(n * 16, step));
#pragma unroll
      for (int m = 0; m < C::kRowTiles; ++m) {
        mma_16816<T>(scores[m][2 * n], a[m], b[0], b[1]);
        mma_16816<T>(scores[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

template <class T, class C>
__device__ __forceinline__ void multiply_pv(Output<C>& output, const Probabilities<C>& p,
                                            const TileFragments& v_tile) {
#pragma unroll
  for (int step = 0; step < C::kBlockN / 16; ++step) {
#pragma unroll
    for (int d = 0; d < C::kD / 16; ++d) {
      uint32_t b[4];  // columns 0-7: keys 0-7, 8-15; columns 8-15: the same
      ldmatrix_x4_trans(b, v_tile.address<C>(step * 16, d));
#pragma unroll
      for (int m = 0; m < C::kRowTiles; ++m) {
        mma_16816<T>(output[m][2 * d], p[m][step], b[0], b[1]);
        mma_16816<T>(output[m][2 * d + 1], p[m][step], b[2], b[3]);
      }
    }
  }
}

}  // namespace gqa::cuda::sm80
