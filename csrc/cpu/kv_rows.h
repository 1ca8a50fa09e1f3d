// How kernels reach K and V: a loader turns a run of keys into row pointers, and kernels read
// nothing but these.
//
// Another kind of cache is another loader with the same `fetch`: a paged one looks the pages up, a
// quantised one unpacks the rows into a buffer of its own and returns pointers into that.
#pragma once

#include <cstdint>

#include "../core/params.h"
#include "isa.h"

namespace gqa::cpu::GQA_ISA {

// K or V of one (sequence, head) in a strided tensor.
template <class T>
struct DenseRows {
  const T* base;   // row 0
  int64_t stride;  // elements from row to row

  DenseRows(const void* data, const Strides& strides, int64_t batch, int64_t head)
      : base(static_cast<const T*>(data) + batch * strides.b + head * strides.h),
        stride(strides.s) {}

  // rows[i] = row first + i
  void fetch(int64_t first, int n, const T** rows) const {
    for (int i = 0; i < n; ++i) rows[i] = base + (first + i) * stride;
  }
};

// Asks for rows ahead of their use, a few at a time, so that the requests spread over the
// arithmetic.
template <class T>
class Prefetcher {
 public:
  // All `n` rows of `dims` elements are asked for after `steps` calls of step().
  Prefetcher(const T* const* rows, int n, int64_t dims, int steps)
      : rows_(rows), n_(n), bytes_(dims * static_cast<int64_t>(sizeof(T))), steps_(steps) {}

  GQA_INLINE void step() {
    progress_ += n_;
    for (; next_ * steps_ < progress_ && next_ < n_; ++next_) {
      const char* row = reinterpret_cast<const char*>(rows_[next_]);
      for (int64_t i = 0; i < bytes_; i += kLineBytes) __builtin_prefetch(row + i);
    }
  }

 private:
  static constexpr int64_t kLineBytes = 64;
  const T* const* rows_;
  int64_t n_, bytes_, steps_;
  int64_t next_ = 0, progress_ = 0;
};

}  // namespace gqa::cpu::GQA_ISA
