// Rows of K and V in pages: each warp looks up the rows that it copies, once per block of keys for
// both, and one block ahead.
//
// Lane l % 16 looks after one row of the block: lanes 0 to 15 of K's, the others of V's. Page ids
// come by cp.async with the K tile of the block before, so that no lane waits for the page table.
// What copies need of a row is one number, its distance from the head's first row: one 32-bit
// multiply-add makes an address of it. A block with a row that has no such number (keys beyond the
// sequence's last, a page that is not in storage, rows 64 GB apart) is copied row by row instead.
#pragma once

#include <cstdint>

#include "../../common/copy_rows.cuh"
#include "../../common/ptx.cuh"
#include "../shared_tile.cuh"
#include "args.h"

namespace gqa::cuda::sm80 {

// Of one warp, in shared memory.
template <class C>
struct alignas(16) WarpPages {
  static constexpr int kPassRows = 32 / C::kChunks;          // rows that the warp copies at once
  static constexpr int kPasses = C::kBlockN / C::kCopyRows;  // times that it does
  static constexpr int kRows = kPassRows * kPasses;          // of a block
  static constexpr uint32_t kNone = ~0u;                     // of a block copied row by row
  static constexpr int kUnit = 8;                            // elements: the 16 bytes of a copy
  static_assert(kRows <= 16 && kPasses % 4 == 0);

  uint32_t distances[2][kRows];  // of K's rows and V's, in units; a thread's rows in succession
  int32_t pages[kRows];

  // Looks up the pages of the first block. `origin`: of K.
  template <class T>
  __device__ __forceinline__ void begin(const PrefillArgs& args, const RowOrigin<T>& origin,
                                        int first_key, int length) {
    const CopyRows<T> rows = key_rows(args, origin);
    const int thread = current_thread(), lane = thread % 32,
              key = key_of(thread / 32, lane, first_key);
    if (lane < kRows && key < length) pages[lane] = rows.page(key);
    __syncwarp();  // pages
  }

  // Finds the rows of a block, whose pages have arrived, and requests the pages of the next one.
  // The caller commits that copy, waits for it, and calls a barrier before the next block.
  template <class T>
  __device__ __forceinline__ void look_up(const PrefillArgs& args, const RowOrigin<T>& origin,
                                          int first_key, int length) {
    const AttentionParams& params = args.params;
    const CopyRows<T> rows = key_rows(args, origin);
    const int thread = current_thread(), lane = thread % 32, mine = lane % 16,
              key = key_of(thread / 32, mine, first_key);
    uint64_t distance = 0;
    bool near = true;
    if (mine < kRows) {
      near = key < length;
      if (near) {
        const uint32_t page = pages[mine], slot = rows.slot(key);
        const int64_t page_stride = lane < 16 ? params.k_stride.b : params.v_stride.b;
        const int64_t stride = lane < 16 ? params.k_stride.s : params.v_stride.s;
        distance = page * static_cast<uint64_t>(page_stride / kUnit) +
                   slot * static_cast<uint64_t>(stride / kUnit);
        near = page < rows.num_pages && distance < kNone;
      }
    }
    const bool all = __all_sync(~0u, near);  // and every lane has read its page
    if (mine < kRows) distances[lane / 16][mine] = all ? static_cast<uint32_t>(distance) : kNone;
    const int next = key + C::kBlockN;
    if (lane < kRows && next < length) {
      cp_async_small<4>(smem_u32(&pages[lane]), rows.page_entry(next), 4);
    }
    __syncwarp();  // distances
  }

  // Starts this thread's copies of the block that was looked up. False: it is to copy row by row.
  // `first`: K's or V's head.
  template <bool kKeys, class T>
  __device__ __forceinline__ bool copy(const T* first, uint32_t to, bool in_dim) const {
    const int thread = current_thread(), lane = thread % 32;
    const uint32_t at = smem_u32(&distances[kKeys ? 0 : 1][lane / C::kChunks * kPasses]);
    first += lane % C::kChunks * kUnit;
#pragma unroll
    for (int i = 0; i < kPasses; i += 4) {
      const uint4 x = ld_shared_v4u(at + i * 4);
      if (i == 0 && x.x == kNone) return false;
      const uint32_t distance[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        cp_async16(to + (i + j) * C::kCopyRows * C::kRowBytes,
                   first + static_cast<uint64_t>(distance[j]) * kUnit, in_dim);
      }
    }
    return true;
  }

 private:
  template <class T>
  static __device__ __forceinline__ CopyRows<T> key_rows(const PrefillArgs& args,
                                                         const RowOrigin<T>& origin) {
    return copy_rows(args.params, args.by_page_size, args.params.k_stride, origin);
  }
  // The key whose row is number `row` of the warp's.
  static __device__ __forceinline__ int key_of(int warp, int row, int first_key) {
    return first_key + warp * kPassRows + row / kPasses + row % kPasses * C::kCopyRows;
  }
};

}  // namespace gqa::cuda::sm80
