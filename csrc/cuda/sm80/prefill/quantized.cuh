// Tiles of quantised K and V: what is stored crosses from global to shared memory as it is, and is
// widened to T there once for all warps, before the product that takes it.
//
// A thread copies 16 numbers of a row to a place of its own (16 bytes, or 8 of int4) and widens the
// same ones, so that it waits for no copies but its own. Zeros are taken off on the way, and V is
// multiplied by its scales; those of K are left to the scores, for integers and fp8 to stay exact.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../../common/copy_rows.cuh"
#include "../../common/mma.cuh"
#include "../../common/ptx.cuh"
#include "../../common/stored_numbers.cuh"
#include "../hidden_keys.cuh"
#include "../products.cuh"
#include "args.h"

namespace gqa::cuda::sm80 {

// Rows of K or V that one (sequence, head) has, in bytes, with their scales and zeros.
struct QuantizedRows {
  CopyRows<Int8> stored;
  CopyRows<float> scales, zeros;
};

template <class T, class C>
using KVRows = std::conditional_t<C::kQuantized, QuantizedRows, CopyRows<T>>;

template <bool kKeys>
__device__ __forceinline__ QuantizedRows quantized_rows(const AttentionParams& params, int b,
                                                        int k_head, int v_head) {
  const int head = kKeys ? k_head : v_head;
  return {copy_rows<Int8>(params, kKeys ? params.k : params.v,
                          kKeys ? params.k_stride : params.v_stride, b, k_head, head),
          scale_rows(params, kKeys, b, k_head, head), zero_rows(params, kKeys, b, k_head, head)};
}

// Row of key `key`, which the sequence has where `there`: of K the poison row where its page is not
// in storage, of V nullptr.
template <bool kKeys, class S>
__device__ __forceinline__ const S* row_of(const CopyRows<S>& rows, int key, uint32_t page,
                                           bool there) {
  if (!there) return nullptr;
  return kKeys ? rows.key_row(key, page) : rows.row(key, page);
}

// Sixteen numbers from `stored` (of int4 its first two words) less their zeros, times `scale`, as
// two chunks of T.
template <class T, class S>
__device__ __forceinline__ void widen_numbers(uint4 stored, float zero, float scale,
                                              uint4 (&chunks)[2]) {
  using Numbers = StoredNumbers<S>;
  constexpr int kN = Numbers::kPerUnit;
  const uint32_t words[4] = {stored.x, stored.y, stored.z, stored.w};
  uint32_t out[8];
#pragma unroll
  for (int w = 0; w < 8 / kN; ++w) {
    uint32_t pairs[kN];
    Numbers::pairs(words[w], pairs);
    float x[2 * kN];
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      x[i] = to_float(Float16{static_cast<uint16_t>(pairs[i])});
      x[kN + i] = to_float(Float16{static_cast<uint16_t>(pairs[i] >> 16)});
    }
#pragma unroll
    for (float& value : x) value = fmaf(value, Numbers::kPart, Numbers::kZero - zero) * scale;
#pragma unroll
    for (int i = 0; i < kN; ++i) out[w * kN + i] = pack<T>(x[2 * i], x[2 * i + 1]);
  }
  chunks[0] = make_uint4(out[0], out[1], out[2], out[3]);
  chunks[1] = make_uint4(out[4], out[5], out[6], out[7]);
}

// One side's tiles, one after another: requested, then widened.
template <class C, bool kKeys>
class QuantizedTiles {
 public:
  // Starts the copy of keys first_key and on, of which those from `length` on become zeros, to
  // kBlockN * kD bytes from `staged` on.
  __device__ __forceinline__ void request(const PrefillArgs& args, const QuantizedRows& rows,
                                          int first_key, int length, uint32_t staged) {
    const AttentionParams& params = args.params;
    const bool int4 = params.k_dtype == DType::kInt4;
    const int bytes = int4 ? 8 : 16;  // of a piece
    const int dim = static_cast<int>(kKeys ? params.head_dim : params.value_head_dim);
    const int from = static_cast<int>(threadIdx.x) % kPieces * bytes;
    const int available = min(max((int4 ? dim / 2 : dim) - from, 0), bytes);
#pragma unroll 1
    for (int i = 0; i < kPasses; ++i) {
      const int key = first_key + i * kRows + static_cast<int>(threadIdx.x) / kPieces;
      const bool there = key < length;
      const Int8* row = row_of<kKeys>(rows.stored, key, there ? rows.stored.page(key) : 0, there);
      const Int8* at = row + from;
      const int count = row == nullptr ? 0 : available;
      const uint32_t to = staged + (i * C::kThreads + threadIdx.x) * 16;
      if (args.elements) {
        copy_bytes(to, at, count);
      } else if (int4) {
        cp_async_small<8>(to, at, count);
      } else {
        cp_async16(to, at, count);
      }
    }
    // Lane l keeps the scale, or from lane 16 on the zero, of row l % 16 of those that the warp
    // has.
    const int lane = threadIdx.x % 32, mine = lane % 16;
    const int key = first_key + mine / kWarpRows * kRows +
                    static_cast<int>(threadIdx.x) / 32 * kWarpRows + mine % kWarpRows;
    const bool there = mine < kPasses * kWarpRows && key < length;
    const CopyRows<float>& numbers = lane < 16 ? rows.scales : rows.zeros;
    const float* at = row_of<kKeys>(numbers, key, there ? numbers.page(key) : 0, there);
    number_ = at == nullptr ? 0.0f : *at;
  }

  // Puts what was requested and has arrived in its place as a tile of T. Of K, the scales go to
  // `scales`, one of each row.
  template <class T>
  __device__ __forceinline__ void widen(const PrefillArgs& args, uint32_t staged, uint32_t tile,
                                        float* scales) {
    switch (args.params.k_dtype) {
      case DType::kFloat8E4M3: return widen_stored<T, Float8E4M3>(args, staged, tile, scales);
      case DType::kFloat8E5M2: return widen_stored<T, Float8E5M2>(args, staged, tile, scales);
      case DType::kInt8: return widen_stored<T, Int8>(args, staged, tile, scales);
      default: return widen_stored<T, Int4Pair>(args, staged, tile, scales);
    }
  }

 private:
  static constexpr int kPieces = C::kD / 16;           // of a row
  static constexpr int kRows = C::kThreads / kPieces;  // that all threads copy at once
  static constexpr int kWarpRows = 32 / kPieces;
  static constexpr int kPasses = C::kBlockN / kRows;
  static_assert(kPasses * kWarpRows <= 16, "a lane keeps one number");

  static __device__ __forceinline__ void copy_bytes(uint32_t to, const Int8* at, int count) {
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (i < count)
        words[i / 4] |= static_cast<uint32_t>(static_cast<uint8_t>(at[i].value)) << (i % 4 * 8);
    }
    st_shared_v4(to, make_uint4(words[0], words[1], words[2], words[3]));
  }

  template <class T, class S>
  __device__ __forceinline__ void widen_stored(const PrefillArgs& args, uint32_t staged,
                                               uint32_t tile, float* scales) {
    const bool has_zeros = (kKeys ? args.params.k_zero : args.params.v_zero) != nullptr;
    const int piece = threadIdx.x % kPieces;
#pragma unroll 1
    for (int i = 0; i < kPasses; ++i) {
      const int row = i * kRows + static_cast<int>(threadIdx.x) / kPieces;
      const int mine = i * kWarpRows + static_cast<int>(threadIdx.x) % 32 / kPieces;
      const float scale = __shfl_sync(~0u, number_, mine);
      const float zero = __shfl_sync(~0u, number_, 16 + mine);
      if (kKeys && piece == 0) scales[row] = scale;
      uint4 chunks[2];
      widen_numbers<T, S>(ld_shared_v4u(staged + (i * C::kThreads + threadIdx.x) * 16),
                          has_zeros ? zero : StoredNumbers<S>::kZero, kKeys ? 1.0f : scale, chunks);
      // Pieces p and p + 4 would meet in the banks: half of the lanes store their second chunk
      // first.
      const int first = piece / 4 % 2;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int chunk = piece * 2 + (c ^ first);
        st_shared_v4(tile + row * C::kRowBytes + ((chunk ^ (row & 7)) << 4),
                     (c ^ first) == 0 ? chunks[0] : chunks[1]);
      }
    }
  }

  float number_ = 0.0f;
};

// Scores of values from products with stored numbers: times the scales of their keys.
template <class C>
__device__ __forceinline__ void scale_keys(Scores<C>& scores, const float* scales) {
#pragma unroll
  for (int n = 0; n < C::kBlockN / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float scale = scales[lane_key(n, e)];
#pragma unroll
      for (int m = 0; m < C::kRowTiles; ++m) {
        scores[m][n][e] *= scale;
        scores[m][n][2 + e] *= scale;
      }
    }
  }
}

}  // namespace gqa::cuda::sm80
