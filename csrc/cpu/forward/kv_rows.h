// How kernels address K and V in any memory layout: for each run of keys, pages are looked up once,
// checked, and turned into row pointers. Kernels read K and V only through these. A dense cache has
// one page per sequence.
#pragma once

#include <cstdint>

#include "../../core/params.h"
#include "../isa/isa.h"
#include "../limits.h"

namespace gqa::cpu::GQA_ISA {

template <class S>
inline constexpr bool kQuantized = true;
template <>
inline constexpr bool kQuantized<float> = false;
template <>
inline constexpr bool kQuantized<BFloat16> = false;
template <>
inline constexpr bool kQuantized<Float16> = false;

// Number d of a row.
template <class S>
GQA_INLINE const S* at(const S* row, int64_t d) {
  return row + d / kNumbersPerElement<S>;
}

// The pages that hold the keys of one (sequence, key head).
class Pages {
 public:
  Pages(const AttentionParams& params, int64_t batch, int64_t k_head)
      : batch_(batch),
        num_pages_(params.num_pages),
        page_size_(params.page_size),
        first_slot_(params.kv_begin == nullptr ? 0 : params.kv_begin[batch]) {
    if (params.page_table != nullptr) {
      table_ = params.page_table + batch * params.page_table_stride_b +
               k_head * params.page_table_stride_h;
      table_stride_ = params.page_table_stride_p;
    }
  }

  // Calls visit(page, slot, i, n) for runs of keys: keys first + i to first + i + n - 1 lie in
  // `page` from `slot` on. Page -1: the table's entry is no page.
  template <class Visit>
  GQA_INLINE void walk(int64_t first, int count, Visit visit) const {
    int64_t slot = first_slot_ + first;
    int64_t index = 0;
    if (slot >= page_size_ && count > 0) {
      index = slot / page_size_;
      slot -= index * page_size_;
    }
    for (int i = 0; i < count; ++index, slot = 0) {
      const int n = static_cast<int>(count - i < page_size_ - slot ? count - i : page_size_ - slot);
      int64_t page = batch_;
      if (table_ != nullptr) {
        page = table_[index * table_stride_];
        if (page < 0 || page >= num_pages_) page = -1;
      }
      visit(page, slot, i, n);
      i += n;
    }
  }

 private:
  const int32_t* table_ = nullptr;
  int64_t table_stride_ = 0;
  int64_t batch_, num_pages_, page_size_, first_slot_;
};

// The row that is read for a key without a page. All ones are NaN in every floating-point type.
struct alignas(64) FilledRow {
  unsigned char bytes[kMaxHeadDim * sizeof(float)];
  explicit constexpr FilledRow(unsigned char byte) : bytes{} {
    for (unsigned char& x : bytes) x = byte;
  }
};
inline constexpr FilledRow kNaNRow{0xff}, kZeroRow{0};

constexpr int64_t kLineBytes = 64;  // of a cache

// Kernels process rows in steps of this many.
constexpr int kRowStep = 4;

// Rows of K or V of one (sequence, head). A key without a page reads as NaN in K, so that its score
// is NaN in rows that see it, and as 0 in V, so that it does not affect other rows. (Integers have
// no NaN; for them the scale is NaN.)
template <class S>
class KVRows {
 public:
  static KVRows k(const AttentionParams& params, const Pages& pages, int64_t head) {
    return {params.k, params.k_stride, pages, head, kNaNRow};
  }
  static KVRows v(const AttentionParams& params, const Pages& pages, int64_t head) {
    return {params.v, params.v_stride, pages, head, kZeroRow};
  }

  // rows[i] = row first + i; the last row is repeated up to a multiple of kRowStep.
  void fetch(int64_t first, int count, const S** rows) const {
    pages_.walk(first, count, [&](int64_t page, int64_t slot, int i, int n) {
      const S* row = page < 0 ? missing_ : base_ + page * page_stride_ + slot * slot_stride_;
      const int64_t step = page < 0 ? 0 : slot_stride_;
      for (int j = i; j < i + n; ++j, row += step) rows[j] = row;
    });
    for (int i = count; i % kRowStep != 0; ++i) rows[i] = rows[count - 1];
  }

 private:
  KVRows(const void* data, const Strides& strides, const Pages& pages, int64_t head,
         const FilledRow& missing)
      : base_(static_cast<const S*>(data) + head * strides.h),
        page_stride_(strides.b),
        slot_stride_(strides.s),
        missing_(reinterpret_cast<const S*>(missing.bytes)),
        pages_(pages) {}

  const S* base_;  // slot 0 of page 0
  int64_t page_stride_, slot_stride_;
  const S* missing_;
  const Pages& pages_;
};

// How the scale or zero of a row is used: value * factor + offset; `constant` if there is no data;
// `missing` if the row has no page.
struct RowValueUse {
  float factor, offset, constant, missing;
};

// out[i] = scale or zero of row first + i of one (sequence, head).
inline void fetch_row_values(const Pages& pages, const float* data, const Strides& strides,
                             int64_t head, int64_t first, int count, const RowValueUse& use,
                             float* out) {
  pages.walk(first, count, [&](int64_t page, int64_t slot, int i, int n) {
    if (page < 0 || data == nullptr) {
      for (int j = i; j < i + n; ++j) out[j] = page < 0 ? use.missing : use.constant;
      return;
    }
    const float* from = data + page * strides.b + head * strides.h + slot * strides.s;
    const float factor = use.factor, offset = use.offset;
    if (strides.s == 1) {  // as appends write them; this loop becomes vectors
      for (int j = 0; j < n; ++j) out[i + j] = from[j] * factor + offset;
    } else {
      for (int j = i; j < i + n; ++j, from += strides.s) out[j] = *from * factor + offset;
    }
  });
}

// Prefetches what fetch_row_values will read.
inline void prefetch_row_values(const Pages& pages, const float* data, const Strides& strides,
                                int64_t head, int64_t first, int count) {
  if (data == nullptr) return;
  const int64_t step = strides.s == 1 ? kLineBytes / static_cast<int64_t>(sizeof(float)) : 1;
  pages.walk(first, count, [&](int64_t page, int64_t slot, int, int n) {
    if (page < 0) return;
    const float* from = data + page * strides.b + head * strides.h + slot * strides.s;
    for (int64_t j = 0; j < n; j += step) __builtin_prefetch(from + j * strides.s);
    __builtin_prefetch(from + (n - 1) * strides.s);
  });
}

// Prefetches rows a few at a time, so that the requests are spread over the arithmetic.
template <class S>
class Prefetcher {
 public:
  // After `steps` calls of step(), all `n` rows of `dims` numbers have been prefetched.
  Prefetcher(const S* const* rows, int n, int64_t dims, int steps)
      : rows_(rows),
        n_(n),
        per_step_((n + steps - 1) / (steps > 0 ? steps : 1)),
        bytes_(dims * static_cast<int64_t>(sizeof(S)) / kNumbersPerElement<S>),
        in_pieces_(n > 1 && distance(n - 1, 0) != (n - 1) * distance(1, 0)) {}

  GQA_INLINE void step() {
    const int end = n_ - next_ < per_step_ ? n_ : next_ + per_step_;
    for (; next_ < end; ++next_) {
      prefetch_row(next_);
      if (in_pieces_ && next_ + kLead < n_ && begins_piece(next_ + kLead))
        prefetch_row(next_ + kLead);
    }
  }

 private:
  // The first row of a page is prefetched this many rows earlier: it waits for memory, and the
  // processor's own prefetching of the rest of the page starts only with it.
  static constexpr int kLead = 15;

  GQA_INLINE void prefetch_row(int i) const {
    const char* row = reinterpret_cast<const char*>(rows_[i]);
    for (int64_t at = 0; at < bytes_; at += kLineBytes) __builtin_prefetch(row + at);
  }
  intptr_t distance(int i, int j) const {
    return reinterpret_cast<intptr_t>(rows_[i]) - reinterpret_cast<intptr_t>(rows_[j]);
  }
  // Whether row i begins a page: its distance from the row before differs.
  GQA_INLINE bool begins_piece(int i) const {
    const intptr_t step = distance(i - 1, i - 2);
    return distance(i, i - 1) != step && distance(i - kLead + 1, i - kLead) == step;
  }

  const S* const* rows_;
  int n_, per_step_, next_ = 0;
  int64_t bytes_;
  bool in_pieces_;
};

}  // namespace gqa::cpu::GQA_ISA
