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
template <class C>
using Output = float[C::kRowTiles][C::kD / 8][4];
// Q as the first operand, where it stays in registers.
template <class C>
using QFragments = uint32_t[C::kQInRegisters ? C::kD / 16 : 1][C::kRowTiles][4];

// Addresses for ldmatrix: 16 x 16 elements at a row (a multiple of 16) and a step of 16 columns.
// Lane l gives row l / 16 * 8 + l % 8 and 16-byte chunk 2 * step + l / 8 % 2. The swizzled chunk,
// (2 * step + c) ^ x, repeats every four steps 128 bytes further on, so that four registers hold
// all addresses and the rest is immediate.
template <class C>
struct LaneOffsets {
  uint32_t at[4];

  __device__ __forceinline__ LaneOffsets() {
    const uint32_t lane = threadIdx.x % 32, x = lane % 8, c = lane / 8 % 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      at[i] = (lane / 16 * 8 + x) * C::kRowBytes + (((2 * i + c) ^ x) << 4);
    }
  }
};

// The same within one tile.
template <class C>
struct TileFragments {
  uint32_t at[4];

  __device__ __forceinline__ TileFragments(uint32_t tile, const LaneOffsets<C>& offsets) {
#pragma unroll
    for (int i = 0; i < 4; ++i) at[i] = tile + offsets.at[i];
  }
  __device__ __forceinline__ uint32_t address(int row, int step) const {
    return at[step % 4] + row * C::kRowBytes + step / 4 * 128;
  }
};

template <class C>
__device__ __forceinline__ void load_q_fragment(uint32_t (&a)[4], const TileFragments<C>& q, int m,
                                                int step) {
  uint32_t r[4];
  ldmatrix_x4(r, q.address(m * 16, step));
  a[0] = r[0], a[1] = r[2], a[2] = r[1], a[3] = r[3];
}

// `q_tile`: the warp's rows in shared memory, where `q` is not used.
template <class T, class C>
__device__ __forceinline__ void multiply_qk(Scores<C>& scores, const QFragments<C>& q,
                                            const TileFragments<C>& q_tile,
                                            const TileFragments<C>& k_tile) {
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
        load_q_fragment<C>(a[m], q_tile, m, step);
      }
    }
#pragma unroll
    for (int n = 0; n < C::kBlockN / 16; ++n) {
      uint32_t b[4];  // keys 0-7: columns 0-7, 8-15; keys 8-15: the same
      ldmatrix_x4(b, k_tile.address(n * 16, step));
#pragma unroll
      for (int m = 0; m < C::kRowTiles; ++m) {
        mma_16816<T>(scores[m][2 * n], a[m], b[0], b[1]);
        mma_16816<T>(scores[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// P, rounded to T, is the first operand as the scores lie in registers.
template <class T, class C>
__device__ __forceinline__ void multiply_pv(Output<C>& output, const Scores<C>& p,
                                            const TileFragments<C>& v_tile) {
#pragma unroll
  for (int step = 0; step < C::kBlockN / 16; ++step) {
    uint32_t a[C::kRowTiles][4];
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&x)[4] = p[m][2 * step + i / 2];
        a[m][i] = pack<T>(x[i % 2 * 2], x[i % 2 * 2 + 1]);
      }
    }
#pragma unroll
    for (int d = 0; d < C::kD / 16; ++d) {
      uint32_t b[4];  // keys 0-7: columns 0-7, 8-15; keys 8-15: the same; each transposed
      ldmatrix_x4_trans(b, v_tile.address(step * 16, d));
#pragma unroll
      for (int m = 0; m < C::kRowTiles; ++m) {
        mma_16816<T>(output[m][2 * d], a[m], b[0], b[2]);
        mma_16816<T>(output[m][2 * d + 1], a[m], b[1], b[3]);
      }
    }
  }
}

}  // namespace gqa::cuda::sm80
