// One warp's ring of stages: which of its blocks of K and V is copied where, and when.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../../../core/params.h"
#include "../../common/copy_rows.cuh"
#include "../../common/ptx.cuh"
#include "config.h"
#include "dequantize.cuh"
#include "load.cuh"
#include "tile.cuh"

namespace gqa::cuda::sm80 {

// Block n is this warp's keys first + n * kDecodeBlock + 0..15. Every call of load_k and load_v
// commits a cp.async group, also where there is no block: waits count groups.
template <class S, class C>
struct WarpPipeline {
  BlockLoader<S, C, true> keys;
  BlockLoader<S, C, false> values;
  using Numbers = std::conditional_t<C::kQuantized, NumberLoader, NoNumbers>;
  Numbers numbers;
  uint32_t stages;  // shared address of the warp's part of stage 0
  int first, end;   // keys
  int blocks;
  bool elements;

  __device__ __forceinline__ WarpPipeline(const DecodeParams& p, const DecodeTile& tile,
                                          uint32_t s_loop, bool elements,
                                          typename Numbers::Rows& number_rows)
      : keys{key_rows<S>(p.attention, p.by_page_size, tile.b, tile.group.k_head),
             static_cast<int>(p.attention.head_dim) * C::kBits / 8, tile.end},
        values{value_rows<S>(p.attention, p.by_page_size, tile.b, tile.group.k_head,
                             tile.group.v_head),
               static_cast<int>(p.attention.value_head_dim) * C::kBits / 8, tile.end},
        numbers(p.attention, p.by_page_size, tile.b, tile.group.k_head, tile.group.v_head, tile.end,
                number_rows),
        elements(elements) {
    const int warp = threadIdx.x / 32;
    stages = s_loop + warp * C::kWarpBytes;
    first = tile.begin + warp * kWarpKeys;
    end = tile.end;
    blocks = first < end ? (end - first + kDecodeBlock - 1) / kDecodeBlock : 0;
  }

  // Where K of block n lies; V and the scales and zeros follow it.
  __device__ __forceinline__ uint32_t stage(int n) const {
    return stages + n % C::kStages * C::kStageBytes;
  }

  // `page`: of this lane's key of the block.
  __device__ __forceinline__ void load_k(int n, uint32_t page) const {
    if (n < blocks) {
      keys.load(first + n * kDecodeBlock, page, stage(n), elements);
      numbers.load(first + n * kDecodeBlock, page, stage(n) + 2 * C::kTileBytes);
    }
    cp_async_commit();
  }
  __device__ __forceinline__ void load_v(int n, uint32_t page) const {
    if (n < blocks) {
      values.load(first + n * kDecodeBlock, page, stage(n) + C::kTileBytes, elements);
    }
    cp_async_commit();
  }

  // The page of this lane's key of block n. It is read a block ahead, so that copies need not wait.
  __device__ __forceinline__ uint32_t page(int n) const {
    const int key = first + n * kDecodeBlock + (threadIdx.x & 15);
    return key < end ? keys.rows.page(key) : 0;
  }

  // Starts the copies of the first stages; returns the page of the next block.
  __device__ __forceinline__ uint32_t fill() const {
    uint32_t next = page(0);
#pragma unroll
    for (int n = 0; n < C::kStages; ++n) {
      load_k(n, next);
      load_v(n, next);
      next = page(n + 1);
    }
    return next;
  }

  // Waits for the oldest copy: K of a block and V of a block take turns.
  __device__ __forceinline__ void wait() const {
    cp_async_wait<2 * C::kStages - 1>();
    __syncwarp();  // the other lanes' copies
  }
};

}  // namespace gqa::cuda::sm80
