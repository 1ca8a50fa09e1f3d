// Tiles of rows from global to shared memory.
#pragma once

#include <cstdint>

#include "../../../core/params.h"
#include "../../common/ptx.cuh"
#include "../shared_tile.cuh"
#include "args.h"
#include "config.h"

namespace gqa::cuda::sm80 {

// Row `row` of a [B, H, S, D] tensor.
template <class T>
__device__ __forceinline__ T* row_at(const void* data, const Strides& strides, int64_t b,
                                     int64_t head, int64_t row) {
  const T* first = static_cast<const T*>(data) + b * strides.b + head * strides.h;
  return const_cast<T*>(first) + row * strides.s;
}

// Starts the copy of kRows rows. Rows from `rows` on become zeros. `stride`: distance between rows.
template <class T, class C, int kRows, bool kGeneral>
__device__ __forceinline__ void load_rows(const BackwardArgs& args, uint32_t to, const T* first,
                                          int64_t stride, int rows, int64_t dim) {
  const CopyPlace<C> place;
  const T* at = first + place.row * stride;
#pragma unroll 4
  for (int i = 0; i < kRows / C::kCopyRows; ++i) {
    const bool valid = place.row + i * C::kCopyRows < rows;
    copy_chunk(to + place.at(i), valid ? at + i * C::kCopyRows * stride : nullptr, place.chunk * 8,
               static_cast<int>(dim), kGeneral && args.elements);
  }
}

// The numbers of kBlockN query tokens, `from` on, to a slot.
template <class C>
__device__ __forceinline__ void load_numbers(uint32_t to, const RowNumbers* from) {
  constexpr int kChunks = C::kBlockN * sizeof(RowNumbers) / 16;
  if (threadIdx.x < kChunks) cp_async16(to + threadIdx.x * 16, from + threadIdx.x * 2);
}

}  // namespace gqa::cuda::sm80
