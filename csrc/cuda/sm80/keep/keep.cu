// Host side of the keep, and the instances of its kernel.
#include <algorithm>

#include "../../launch.h"
#include "kernel.cuh"
#include "launch.h"

namespace gqa::cuda::sm80 {
namespace {

int64_t grid_x(const KeepParams& p) {
  return p.cache.batch * (p.cache.num_k_heads + p.cache.num_v_heads);
}

// Whether the rows of a side consist of whole 16-byte pieces. A dim with one index needs no stride.
bool in_pieces(const KeepParams& p, const KeptSide& side, const Strides& stride, int64_t heads) {
  const int64_t pages = p.cache.page_table ? p.cache.num_pages : p.cache.batch;
  const auto aligned = [&](int64_t stride, int64_t extent) {
    return extent <= 1 || stride * side.element_bytes % sizeof(uint4) == 0;
  };
  return reinterpret_cast<uintptr_t>(side.data) % sizeof(uint4) == 0 &&
         side.row_bytes % sizeof(uint4) == 0 && aligned(stride.b, pages) &&
         aligned(stride.h, heads) && aligned(stride.s, p.cache.page_size);
}

}  // namespace

std::string keep_unsupported(const KeepParams& p) {
  const auto is = [](const char* name, int64_t value, const char* rule) {
    return std::string(name) + " must be " + rule + ", got " + std::to_string(value);
  };
  if (p.cache.num_k_heads < 1) return is("Hk", p.cache.num_k_heads, "at least 1");
  if (p.cache.kv_len > INT32_MAX) return is("Sk", p.cache.kv_len, "below 2^31");
  if (grid_x(p) > INT32_MAX) return is("B * (Hk + Hv)", grid_x(p), "below 2^31");
  return "";
}

bool keep_supported(const KeepParams& params) { return keep_unsupported(params).empty(); }

size_t keep_workspace_bytes(const KeepParams&, const Device&) { return 0; }

void keep(const KeepParams& params, void*, const Device&, cudaStream_t stream) {
  const std::string reason = keep_unsupported(params);
  if (!reason.empty()) throw std::runtime_error("sm80 keep: " + reason);
  const AttentionParams& cache = params.cache;
  if (grid_x(params) == 0 || params.num_indices == 0) return;
  const bool pieces = in_pieces(params, params.k, cache.k_stride, cache.num_k_heads) &&
                      in_pieces(params, params.v, cache.v_stride, cache.num_v_heads);
  const int64_t bytes = std::max(params.k.row_bytes, params.v.row_bytes);
  const dim3 grid(static_cast<uint32_t>(grid_x(params)),
                  static_cast<uint32_t>((bytes - 1) / kKeepBytes + 1));
  launch_kernel("sm80 keep", pieces ? keep_kernel<uint4> : keep_kernel<uint8_t>, grid, kKeepThreads,
                0, stream, params);
}

}  // namespace gqa::cuda::sm80
