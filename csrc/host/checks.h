// Checks that memory safety requires. gqa_kernels/call checks what arguments mean; these checks
// prevent a direct call of the op from reading or writing out of bounds. Order: dtype, device,
// layout, shape.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <string>

namespace gqa::host {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string listed(const int64_t* values, size_t n) {
  std::string text = "(";
  for (size_t i = 0; i < n; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + ")";
}

inline void check_dtype(const char* name, const Tensor& x, ScalarType dtype) {
  STD_TORCH_CHECK(x.scalar_type() == dtype, name, " must have dtype ",
                  torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(x.scalar_type()));
}

// The stride of a dim with one element has no meaning, and neither have strides of empty tensors.
inline void check_last_dim_contiguous(const char* name, const Tensor& x) {
  const int64_t last = x.dim() - 1;
  STD_TORCH_CHECK(last >= 0 && (x.size(last) <= 1 || x.stride(last) == 1 || x.numel() == 0), name,
                  " must have a last dim of stride 1, got stride ", last >= 0 ? x.stride(last) : 0);
}

inline void check_shape(const char* name, const Tensor& x, std::initializer_list<int64_t> shape) {
  const auto sizes = x.sizes();
  bool same = sizes.size() == shape.size();
  for (size_t i = 0; same && i < shape.size(); ++i) same = sizes[i] == shape.begin()[i];
  STD_TORCH_CHECK(same, name, " must have shape ", listed(shape.begin(), shape.size()), ", got ",
                  listed(sizes.data(), sizes.size()));
}

}  // namespace gqa::host
