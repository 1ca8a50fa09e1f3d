#include <cuda_runtime_api.h>

#include <cstdint>

#include "../../launch.h"
#include "tensor_map.h"

namespace gqa::cuda::sm90 {
namespace {

constexpr int64_t kElement = 2;                   // bytes
constexpr int64_t kMaxStride = int64_t{1} << 40;  // bytes
constexpr int64_t kMaxExtent = int64_t{1} << 31;

// Looked up through the runtime, so that the library loads without libcuda, that is without a
// driver.
auto encode_function() {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                           cudaEnableDefault, &found),
          "cudaGetDriverEntryPointByVersion(cuTensorMapEncodeTiled)");
    if (found != cudaDriverEntryPointSuccess || function == nullptr) {
      throw std::runtime_error(
          "the CUDA driver has no cuTensorMapEncodeTiled: it must be 12.0 or newer");
    }
    return reinterpret_cast<Encode>(function);
  }();
  return encode;
}

// Extents from the innermost dim on, with the stride in bytes to the next element of each.
struct Dims {
  int64_t extent[4], stride[4];
  const char* name[4];
};
Dims dims_of(const TensorView& t) {
  return {{t.dim, t.length, t.heads, t.batch},
          {kElement, t.stride.s * kElement, t.stride.h * kElement, t.stride.b * kElement},
          {"dim", "sequence", "head", "batch"}};
}

}  // namespace

bool is_empty(const TensorView& t) {
  return t.dim == 0 || t.length == 0 || t.heads == 0 || t.batch == 0;
}

std::string tensor_map_unsupported(const TensorView& tensor) {
  if (is_empty(tensor)) return "";
  const std::string name = tensor.name;
  if (reinterpret_cast<uintptr_t>(tensor.data) % 16 != 0) {
    return name + " must begin at a multiple of 16 bytes for TMA, got address " +
           std::to_string(reinterpret_cast<uintptr_t>(tensor.data));
  }
  const Dims dims = dims_of(tensor);
  for (int i = 0; i < 4; i++) {
    if (dims.extent[i] > kMaxExtent) {
      return name + "'s " + dims.name[i] + " extent must be at most 2^31 for TMA, got " +
             std::to_string(dims.extent[i]);
    }
    if (i == 0 || dims.extent[i] == 1) continue;
    if (dims.stride[i] <= 0 || dims.stride[i] % 16 != 0 || dims.stride[i] >= kMaxStride) {
      return name + "'s " + dims.name[i] +
             " stride must be a positive multiple of 16 bytes below 2^40 for TMA, got " +
             std::to_string(dims.stride[i]) + " bytes";
    }
  }
  return "";
}

CUtensorMap make_tensor_map(const TensorView& tensor, DType dtype, int rows) {
  CUtensorMap map{};
  const Dims dims = dims_of(tensor);
  cuuint64_t extents[4], strides[3];
  for (int i = 0; i < 4; i++) extents[i] = static_cast<cuuint64_t>(dims.extent[i]);
  // A dim of extent 1 may have any stride, because it is never used.
  for (int i = 1; i < 4; i++) {
    strides[i - 1] = static_cast<cuuint64_t>(dims.extent[i] == 1 ? 16 : dims.stride[i]);
  }
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(rows), 1, 1}, steps[4] = {1, 1, 1, 1};
  const CUresult status =
      encode_function()(&map,
                        dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                  : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                        4, const_cast<void*>(tensor.data), extents, strides, box, steps,
                        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error(std::string("cuTensorMapEncodeTiled failed for ") + tensor.name +
                             " with CUresult " + std::to_string(static_cast<int>(status)));
  }
  return map;
}

}  // namespace gqa::cuda::sm90
