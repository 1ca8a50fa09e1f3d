// The end of a warp's rows: sums of products to gradients in global memory.
#pragma once

#include <cstdint>

#include "../../common/mma.cuh"
#include "../../common/ptx.cuh"
#include "../products.cuh"
#include "../shared_tile.cuh"
#include "config.h"

namespace gqa::cuda::sm80 {

// `staged`: shared memory of the warp's kWarpRows rows, which no other warp reads.
template <class T, class C>
__device__ __forceinline__ void store_gradient(T* first, int64_t stride, int rows, int64_t dim,
                                               uint32_t staged, const Output<C>& sums,
                                               float factor) {
  __syncwarp();  // the rows' other lanes have read what was there
#pragma unroll
  for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = m * 16 + h * 8 + static_cast<int>(threadIdx.x % 32 / 4);
#pragma unroll
      for (int d = 0; d < C::kD / 8; ++d) {
        st_shared_u32(staged_pair<C>(staged, row, d),
                      pack<T>(sums[m][d][h * 2] * factor, sums[m][d][h * 2 + 1] * factor));
      }
    }
  }
  __syncwarp();  // the rows of the other lanes
  store_rows<T, C>(first, stride, rows, static_cast<int>(dim), staged);
}

}  // namespace gqa::cuda::sm80
