// The addresses of rows of K and V. One function covers dense tensors, sequences that begin at some
// slot (left padding, packed sequences) and pages. Offsets are converted to 64 bits before they are
// multiplied by a stride.
#pragma once

#include <cstdint>

#include "../../core/params.h"
#include "../../core/visible.h"
#include "page_divider.h"

namespace gqa::cuda {

// The keys of a page outside the storage are read from here: NaN in bf16 and fp16. A row that sees
// such a key gets a NaN score and so a NaN output. A row that does not see it masks the NaN.
constexpr int kMaxRowDim = 256;
struct PoisonRow {
  uint4 chunks[kMaxRowDim * 2 / 16];
};
__device__ const PoisonRow poison_row = [] {
  PoisonRow row{};
  for (auto& chunk : row.chunks) chunk = {~0u, ~0u, ~0u, ~0u};
  return row;
}();

// Where the rows of one (sequence, head) begin. The other fields of CopyRows are the same for all
// heads.
template <class T>
struct RowOrigin {
  const T* base;         // of the head; dense: row of key 0 of the sequence
  const int32_t* table;  // of (sequence, key head), or nullptr: dense
  uint32_t first;        // slot of key 0
};

// The rows of K or V of one (sequence, head).
template <class T>
struct CopyRows : RowOrigin<T> {
  using RowOrigin<T>::base, RowOrigin<T>::table, RowOrigin<T>::first;
  int64_t stride;  // from slot to slot
  int64_t table_stride, page_stride;
  uint32_t page_size, num_pages;
  PageDivider by_page_size;

  // The address of the table entry for the page that holds key `j`.
  __device__ __forceinline__ const int32_t* page_entry(uint32_t j) const {
    return table + by_page_size.quotient(first + j) * table_stride;
  }
  // That entry, so that callers can prefetch it.
  __device__ __forceinline__ uint32_t page(uint32_t j) const {
    return table == nullptr ? 0 : *page_entry(j);
  }

  // The slot of key `j` in its page.
  __device__ __forceinline__ uint32_t slot(uint32_t j) const {
    return first + j - by_page_size.quotient(first + j) * page_size;
  }

  // The row of key `j`, which must belong to the sequence; nullptr if its page is not in storage.
  __device__ __forceinline__ const T* row(uint32_t j, uint32_t page) const {
    if (table == nullptr) return base + j * stride;
    if (page >= num_pages) return nullptr;
    return base + page * page_stride + slot(j) * stride;
  }
  __device__ __forceinline__ const T* row(uint32_t j) const { return row(j, page(j)); }

  // The same for keys, but with the poison row instead of nullptr.
  __device__ __forceinline__ const T* key_row(uint32_t j, uint32_t page) const {
    const T* at = row(j, page);
    return at != nullptr ? at : reinterpret_cast<const T*>(&poison_row);
  }
  __device__ __forceinline__ const T* key_row(uint32_t j) const { return key_row(j, page(j)); }
};

// `head` is the head of K or V that `data` holds; the table is that of `k_head` for both.
template <class T>
__device__ __forceinline__ RowOrigin<T> row_origin(const AttentionParams& params, const void* data,
                                                   const Strides& strides, int b, int k_head,
                                                   int head) {
  const int64_t first = first_slot(params, b);
  RowOrigin<T> origin{static_cast<const T*>(data) + head * strides.h, params.page_table,
                      static_cast<uint32_t>(first)};
  if (params.page_table == nullptr) {
    origin.base += b * strides.b + first * strides.s;
  } else {
    origin.table += b * params.page_table_stride_b + k_head * params.page_table_stride_h;
  }
  return origin;
}

// `by_page_size` divides by the page size, if there are pages.
template <class T>
__device__ __forceinline__ CopyRows<T> copy_rows(const AttentionParams& params,
                                                 PageDivider by_page_size, const Strides& strides,
                                                 const RowOrigin<T>& origin) {
  CopyRows<T> rows;
  static_cast<RowOrigin<T>&>(rows) = origin;
  rows.stride = strides.s;
  if (params.page_table != nullptr) {
    rows.table_stride = params.page_table_stride_p;
    rows.page_stride = strides.b;
    rows.page_size = static_cast<uint32_t>(params.page_size);
    rows.by_page_size = by_page_size;
    rows.num_pages = static_cast<uint32_t>(params.num_pages);
  }
  return rows;
}

template <class T>
__device__ __forceinline__ CopyRows<T> key_rows(const AttentionParams& params,
                                                PageDivider by_page_size, int b, int k_head) {
  return copy_rows<T>(params, by_page_size, params.k_stride,
                      row_origin<T>(params, params.k, params.k_stride, b, k_head, k_head));
}

template <class T>
__device__ __forceinline__ CopyRows<T> value_rows(const AttentionParams& params,
                                                  PageDivider by_page_size, int b, int k_head,
                                                  int v_head) {
  return copy_rows<T>(params, by_page_size, params.v_stride,
                      row_origin<T>(params, params.v, params.v_stride, b, k_head, v_head));
}

// The scale or zero of keys that have none of their own.
struct DefaultNumbers {
  float scale, zero;
};
__device__ const DefaultNumbers default_numbers{1.0f, 0.0f};

// Scales or zeros of K or V, [P, H, page_size] with `strides`. If there are none, every key has the
// value `otherwise`.
__device__ __forceinline__ CopyRows<float> number_rows(const AttentionParams& params,
                                                       PageDivider by_page_size, const float* data,
                                                       Strides strides, const float* otherwise,
                                                       int b, int k_head, int head) {
  if (data == nullptr) {
    data = otherwise;
    strides = {0, 0, 0};
  }
  return copy_rows<float>(params, by_page_size, strides,
                          row_origin<float>(params, data, strides, b, k_head, head));
}

__device__ __forceinline__ CopyRows<float> scale_rows(const AttentionParams& params,
                                                      PageDivider by_page_size, bool keys, int b,
                                                      int k_head, int head) {
  return number_rows(params, by_page_size, keys ? params.k_scale : params.v_scale,
                     keys ? params.k_scale_stride : params.v_scale_stride, &default_numbers.scale,
                     b, k_head, head);
}

__device__ __forceinline__ CopyRows<float> zero_rows(const AttentionParams& params,
                                                     PageDivider by_page_size, bool keys, int b,
                                                     int k_head, int head) {
  return number_rows(params, by_page_size, keys ? params.k_zero : params.v_zero,
                     keys ? params.k_zero_stride : params.v_zero_stride, &default_numbers.zero, b,
                     k_head, head);
}

}  // namespace gqa::cuda
