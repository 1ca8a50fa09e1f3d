// Tiles of quantised K and V. They are copied from global to shared memory in stored form and
// converted to T there, once for all warps, before the product that uses them.
//
// A thread copies 16 numbers of a row to a place of its own (16 bytes, or 8 for int4) and converts
// the same numbers, so it waits only for its own copies. The conversion subtracts zeros and
// multiplies V by its scales. The scales of K are applied to the scores, so that integers and fp8
// stay exact.
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
using KVRows = std::conditional_t<C::kQuantized, QuantizedRows, RowOrigin<T>>;

template <bool kKeys>
__device__ __forceinline__ QuantizedRows quantized_rows(const AttentionParams& params,
                                                        PageDivider by_page_size, int b, int k_head,
                                                        int v_head) {
  const int head = kKeys ? k_head : v_head;
  const Strides& strides = kKeys ? params.k_stride : params.v_stride;
  const auto origin =
      row_origin<Int8>(params, kKeys ? params.k : params.v, strides, b, k_head, head);
  return {copy_rows(params, by_page_size, strides, origin),
          scale_rows(params, by_page_size, kKeys, b, k_head, head),
          zero_rows(params, by_page_size, kKeys, b, k_head, head)};
}

// The sixteen numbers in shared memory from `stored` on, less their zeros, times `scale`, as two
// chunks of T.
template <class T, class S>
__device__ __forceinline__ void widen_numbers(uint32_t stored, float zero, float scale,
                                              uint4 (&chunks)[2]) {
  using Numbers = StoredNumbers<S>;
  constexpr int kN = Numbers::kPerUnit;
  uint32_t words[8 / kN], out[8];
  if constexpr (kN == 4) {
    const float2 x = ld_shared_v2(stored);
    words[0] = __float_as_uint(x.x), words[1] = __float_as_uint(x.y);
  } else {
    const uint4 x = ld_shared_v4u(stored);
    words[0] = x.x, words[1] = x.y, words[2] = x.z, words[3] = x.w;
  }
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

// The tiles of one side, one after another: requested, then converted.
template <class C, bool kKeys>
struct QuantizedTiles {
  // Starts the copy of keys first_key and on, of which those from `length` on become zeros, to
  // kBlockN * kD bytes from `staged` on.
  static __device__ __forceinline__ void request(const PrefillArgs& args, const QuantizedRows& rows,
                                                 int first_key, int length, uint32_t staged) {
    const AttentionParams& params = args.params;
    const bool int4 = params.k_dtype == DType::kInt4;
    const int bytes = int4 ? 8 : 16;  // of a piece
    const int dim = static_cast<int>(kKeys ? params.head_dim : params.value_head_dim);
    const uint32_t thread = current_thread();
    const int from = static_cast<int>(thread % kPieces) * bytes;
    const int available = min(max((int4 ? dim / 2 : dim) - from, 0), bytes);
#pragma unroll 1
    for (int i = 0; i < kPasses; ++i) {
      const int key = first_key + static_cast<int>(i * kRows + thread / kPieces);
      const Int8* row = key < length ? row_of(rows.stored, key) : nullptr;
      const int count = row == nullptr ? 0 : available;
      const uint32_t to = staged + (i * C::kThreads + thread) * 16;
      if (args.elements) {
        copy_bytes(to, row + from, count);
      } else if (int4) {
        cp_async_small<8>(to, row + from, count);
      } else {
        cp_async16(to, row + from, count);
      }
    }
    const float* number = number_at(rows, first_key, length);
    if (number != nullptr) prefetch_l1(number);
  }

  // Puts what was requested and has arrived in its place as a tile of T. Of K, the scales go to
  // `scales`, one of each row.
  template <class T>
  static __device__ __forceinline__ void widen(const PrefillArgs& args, const QuantizedRows& rows,
                                               int first_key, int length, uint32_t staged,
                                               uint32_t tile, float* scales) {
    const float* at = number_at(rows, first_key, length);
    const float number = at == nullptr ? 0.0f : *at;
    switch (args.params.k_dtype) {
      case DType::kFloat8E4M3:
        return widen_stored<T, Float8E4M3>(args, number, staged, tile, scales);
      case DType::kFloat8E5M2:
        return widen_stored<T, Float8E5M2>(args, number, staged, tile, scales);
      case DType::kInt8: return widen_stored<T, Int8>(args, number, staged, tile, scales);
      default: return widen_stored<T, Int4Pair>(args, number, staged, tile, scales);
    }
  }

 private:
  static constexpr int kPieces = C::kD / 16;           // of a row
  static constexpr int kRows = C::kThreads / kPieces;  // that all threads copy at once
  static constexpr int kWarpRows = 32 / kPieces;
  static constexpr int kPasses = C::kBlockN / kRows;
  static_assert(kPasses * kWarpRows <= 16, "a lane keeps one number");

  // Row of a key that the sequence has: where its page is not in storage, the poison row of K,
  // nullptr of V.
  template <class S>
  static __device__ __forceinline__ const S* row_of(const CopyRows<S>& rows, int key) {
    return kKeys ? rows.key_row(key) : rows.row(key);
  }

  // Where this lane's number is: lane l looks after the scale, or from lane 16 on the zero, of row
  // l % 16 of those that its warp has. Not kept in a register from request to widening: the scores
  // between them leave none.
  static __device__ __forceinline__ const float* number_at(const QuantizedRows& rows, int first_key,
                                                           int length) {
    const uint32_t thread = current_thread(), mine = thread % 16;
    const int key = first_key + static_cast<int>(mine / kWarpRows * kRows +
                                                 thread / 32 * kWarpRows + mine % kWarpRows);
    if (mine >= kPasses * kWarpRows || key >= length) return nullptr;
    return row_of(thread % 32 < 16 ? rows.scales : rows.zeros, key);
  }

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
  static __device__ __forceinline__ void widen_stored(const PrefillArgs& args, float number,
                                                      uint32_t staged, uint32_t tile,
                                                      float* scales) {
    const bool has_zeros = (kKeys ? args.params.k_zero : args.params.v_zero) != nullptr;
    const uint32_t thread = current_thread(), piece = thread % kPieces;
#pragma unroll 1
    for (int i = 0; i < kPasses; ++i) {
      const uint32_t row = i * kRows + thread / kPieces;
      const uint32_t mine = i * kWarpRows + thread % 32 / kPieces;
      const float scale = __shfl_sync(~0u, number, mine);
      const float zero = __shfl_sync(~0u, number, 16 + mine);
      if (kKeys && piece == 0) scales[row] = scale;
      uint4 chunks[2];
      widen_numbers<T, S>(staged + (i * C::kThreads + thread) * 16,
                          has_zeros ? zero : StoredNumbers<S>::kZero, kKeys ? 1.0f : scale, chunks);
      // Pieces p and p + 4 would meet in the banks: half of the lanes store their second chunk
      // first.
      const uint32_t first = piece / 4 % 2;
#pragma unroll
      for (uint32_t c = 0; c < 2; ++c) {
        const uint32_t chunk = piece * 2 + (c ^ first);
        st_shared_v4(tile + row * C::kRowBytes + ((chunk ^ (row & 7)) << 4),
                     (c ^ first) == 0 ? chunks[0] : chunks[1]);
      }
    }
  }
};

// Scores of values from products with stored numbers: times the scales of their keys, in shared
// memory.
template <class C>
__device__ __forceinline__ void scale_keys(Scores<C>& scores, uint32_t scales) {
  scales += lane_key(0, 0) * 4;
#pragma unroll
  for (int n = 0; n < C::kBlockN / 8; ++n) {
    const float2 scale = ld_shared_v2(scales + n * 32);
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        scores[m][n][2 * h] *= scale.x;
        scores[m][n][2 * h + 1] *= scale.y;
      }
    }
  }
}

}  // namespace gqa::cuda::sm80
