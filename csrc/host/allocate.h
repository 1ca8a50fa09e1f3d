// Allocates results. If memory runs out, the error names the result and its size: torch's stable
// interface replaces its own message by the name of the failed call.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <sstream>
#include <stdexcept>
#include <vector>

#include "checks.h"

namespace gqa::host {

// Calls `allocate`, which makes a tensor of that shape. name: what the result is, and of which op.
template <class Allocate>
Tensor or_say_what(const char* name, const int64_t* sizes, size_t dims, ScalarType dtype,
                   Allocate allocate) {
  try {
    return allocate();
  } catch (const std::runtime_error&) {
    using torch::stable::detail::from, torch::stable::detail::to;
    double bytes = static_cast<double>(aoti_torch_dtype_element_size(to<int32_t>(from(dtype))));
    for (size_t i = 0; i < dims; ++i) bytes *= static_cast<double>(sizes[i]);
    std::ostringstream text;
    text.precision(4);
    text << "can't allocate memory for " << name << ": shape " << listed(sizes, dims) << " of "
         << torch::headeronly::toString(dtype) << ", " << bytes / (1 << 30) << " GiB";
    throw std::runtime_error(text.str());
  }
}

inline Tensor new_result(const char* name, const Tensor& like, const std::vector<int64_t>& sizes,
                         ScalarType dtype) {
  return or_say_what(name, sizes.data(), sizes.size(), dtype,
                     [&] { return torch::stable::new_empty(like, sizes, dtype); });
}

}  // namespace gqa::host
