// The arguments of the append's kernel besides the call.
#pragma once

#include <cstdint>

#include "../../../core/append_params.h"

namespace gqa::cuda::sm80 {

constexpr int kAppendThreads = 128;
constexpr int kAppendNumbers = 8;  // of a row, that one thread takes: 16 bytes of 16-bit numbers

// New rows of one kind, and where to store them.
struct AppendSide {
  const void* from;  // [B, H, S, dim], or packed
  void* to;          // [P, H, page_size, dim] as stored; of queries: like `from`
  Strides from_stride, to_stride;
  float *scale, *zero;  // [P, H, page_size] or nullptr
  Strides scale_stride, zero_stride;
  uint32_t dim;
  bool from_vectors, to_vectors;  // a thread's numbers are one vector (fp32: two)
  bool turned;                    // by the rotary embedding
  bool dynamic;                   // scale and zero are found for each row and written
};

enum AppendKind { kKeys, kValues, kQueries, kNumKinds };

// A row is a new token of one head. The heads are those of K, then V, then, if they are rotated, Q.
struct AppendArgs {
  AppendParams params;
  AppendSide sides[kNumKinds];
  uint32_t rows, heads;  // heads: of one token
  uint32_t lanes;        // threads that take a row together: a power of two, at most 32
  bool angle_vectors;    // as from_vectors, of the tables of cosines and sines
};

}  // namespace gqa::cuda::sm80
