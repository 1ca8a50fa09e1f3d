// A tile of rows of kD 16-bit elements in shared memory: how it is filled, where ldmatrix finds its
// fragments, how results leave through it.
//
// The 16-byte chunks of a row are permuted by chunk ^ (row % 8), so that the eight rows an ldmatrix
// reads at one chunk lie in eight different banks of 16 bytes. A configuration C says kD,
// kRowBytes = 2 * kD, kChunks = kD / 8, kThreads and kCopyRows = kThreads / kChunks.
#pragma once

#include <cstdint>

#include "../common/ptx.cuh"

namespace gqa::cuda::sm80 {

// What one thread copies: 16-byte chunk `chunk` of rows row, row + kCopyRows, ... of a tile.
template <class C>
struct CopyPlace {
  int row, chunk;
  uint32_t offset;  // of the chunk of the first row in the tile's shared memory

  __device__ __forceinline__ explicit CopyPlace(uint32_t thread = threadIdx.x) {
    chunk = thread % C::kChunks;
    row = thread / C::kChunks;
    offset = row * C::kRowBytes + ((chunk ^ (row & 7)) << 4);
  }

  // The offset of row + i * kCopyRows. Where fewer than 8 rows are copied at once, these are a
  // power of two, which flips a bit that `row` lacks.
  __device__ __forceinline__ uint32_t at(int i) const {
    return (offset ^ ((i * C::kCopyRows & 7) << 4)) + i * C::kCopyRows * C::kRowBytes;
  }
};

// Eight elements that no 16-byte load can take: unaligned, or the row ends among them.
template <class T>
__device__ __forceinline__ uint4 load_elements(const T* row, int column, int dim) {
  uint32_t x[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (column + i < dim) x[i / 2] |= static_cast<uint32_t>(row[column + i].bits) << (i % 2 * 16);
  }
  return make_uint4(x[0], x[1], x[2], x[3]);
}

// Copies one row's chunk, or zeros where `row` is nullptr or the chunk lies beyond `dim`.
// `elements`: 16-byte copies are ruled out; the copy is then done when the function returns.
template <class T>
__device__ __forceinline__ void copy_chunk(uint32_t to, const T* row, int column, int dim,
                                           bool elements) {
  if (elements) {
    st_shared_v4(to, row == nullptr ? make_uint4(0, 0, 0, 0) : load_elements(row, column, dim));
  } else {
    cp_async16(to, row + column, row != nullptr && column < dim);
  }
}

// Addresses for ldmatrix within a tile: 16 x 16 elements at a row (a multiple of 16) and a step of
// 16 columns, whose four 8 x 8 matrices must land in the order of mma's operands, because mma takes
// neighbouring registers. First operands, and (transposed) the second ones of weighted rows, as Q
// and V are: lane l gives row l % 16 and chunk 2 * step + l / 16. Second operands of rows times
// rows, as K is: row l / 16 * 8 + l % 8 and chunk 2 * step + l / 8 % 2. The swizzled chunk,
// (2 * step + c) ^ (row % 8) = 2 * step ^ c ^ (row % 8), repeats every four steps 128 bytes further
// on. So a lane keeps the offset of step 0, and the rest is immediate.
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

// Where a warp stages a pair of results: columns 8 * d + 2 * (lane % 4) and the next of its row.
template <class C>
__device__ __forceinline__ uint32_t staged_pair(uint32_t staged, int row, int d) {
  return staged + row * C::kRowBytes + ((d ^ (row & 7)) << 4) + threadIdx.x % 4 * 4;
}

// One warp's staged rows to global memory, in 16-byte pieces where these fit.
template <class T, class C>
__device__ __forceinline__ void store_rows(T* first, int64_t stride, int rows, int dim,
                                           uint32_t staged) {
  const int lane = threadIdx.x % 32, chunk = lane % C::kChunks;
  const bool aligned =
      stride % 8 == 0 && dim % 8 == 0 && reinterpret_cast<uintptr_t>(first) % 16 == 0;
  T* out = first + chunk * 8;
#pragma unroll 4
  for (int row = lane / C::kChunks; row < rows; row += 32 / C::kChunks) {
    const uint4 x = ld_shared_v4u(staged + row * C::kRowBytes + ((chunk ^ (row & 7)) << 4));
    T* at = out + row * stride;
    if (aligned) {
      if (chunk * 8 < dim) st_global_v4(at, x);
    } else {
      const uint32_t pairs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (chunk * 8 + i < dim) at[i].bits = static_cast<uint16_t>(pairs[i / 2] >> (i % 2 * 16));
      }
    }
  }
}

}  // namespace gqa::cuda::sm80
