#include "call_cuda.h"

#include <torch/csrc/stable/ops.h>

#include "stream_lookup_cuda.h"

namespace gqa::host {
namespace {

constexpr int kMinCapability = 80;    // mma.m16n8k16 and cp.async
constexpr int64_t kMaxHeadDim = 256;  // of the kernels for the largest head dims

void check_contiguous(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 1 && (x.size(0) <= 1 || x.stride(0) == 1), name,
                  " must have 1 dim of stride 1, got ", x.dim(), " dims");
}

}  // namespace

void check_cuda(const char* name, const Tensor& x, const Tensor& q) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == q.get_device_index(), name,
                  " must be on cuda:", q.get_device_index(), " as q is, got ",
                  x.is_cuda() ? "cuda:" : "another device", x.is_cuda() ? x.get_device_index() : 0);
}

cuda::Device check_cuda_call(const Inputs& in) {
  const cuda::Device device = cuda::current_device();
  STD_TORCH_CHECK(device.capability >= kMinCapability,
                  "the device must have compute capability 8.0 or more, got ",
                  device.capability / 10, ".", device.capability % 10);
  check_inputs(in, kMaxHeadDim, check_cuda);
  // Kernels read these as arrays, and the host can't copy them.
  check_contiguous("head_map", in.head_map);
  if (in.value_head_map) check_contiguous("value_head_map", *in.value_head_map);
  if (in.sinks) check_contiguous("sinks", *in.sinks);
  if (in.dropout_seed) check_contiguous("dropout_seed", *in.dropout_seed);
  STD_TORCH_CHECK(!in.key_ranges, "key_ranges must be None on CUDA devices, got a tensor");
  STD_TORCH_CHECK(in.dropout_p == 0 || !(in.kv_begin || in.q_offsets),
                  "dropout_p must be 0 with kv_begin or q_offsets on CUDA devices, got ",
                  in.dropout_p);
  if (in.q_offsets) {
    STD_TORCH_CHECK(in.max_q_len >= 0 && in.max_q_len <= in.q.size(2),
                    "max_q_len must be 0 to q.shape[2] (", in.q.size(2), "), got ", in.max_q_len);
    check_contiguous("q_offsets", *in.q_offsets);
  }
  if (in.kv_begin) check_contiguous("kv_begin", *in.kv_begin);
  return device;
}

cudaStream_t current_stream(int32_t device) {
  // Looked up at the call, because the library must also load with a torch without CUDA.
  static const GetStream get = find_get_stream();
  STD_TORCH_CHECK(get != nullptr, "this torch was built without CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(get(device, &stream) == 0, "torch has no current stream on cuda:", device);
  return static_cast<cudaStream_t>(stream);
}

Tensor workspace_of(const Tensor& q, size_t bytes) {
  return torch::stable::new_empty(q, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

}  // namespace gqa::host
