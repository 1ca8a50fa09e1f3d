// Descriptors of 4-D tensors for TMA, made on the host.
#pragma once

#include <cuda.h>

#include <string>

#include "../../../core/params.h"

namespace gqa::cuda::sm90 {

// A tensor [B, H, S, D] of 16-bit elements; strides in elements, the last one is 1.
struct TensorView {
  const char* name;
  const void* data;
  Strides stride;
  int64_t batch, heads, length, dim;
};

// Why TMA can't address the tensor, or an empty string.
std::string tensor_map_unsupported(const TensorView& tensor);

bool is_empty(const TensorView& tensor);

// For boxes of [rows, 64], with the 128-byte swizzle; the tensor is not empty.
CUtensorMap make_tensor_map(const TensorView& tensor, DType dtype, int rows);

}  // namespace gqa::cuda::sm90
