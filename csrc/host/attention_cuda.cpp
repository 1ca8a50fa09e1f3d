#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "../cuda/attention.h"
#include "attention.h"

namespace gqa::host {
namespace {

constexpr int kMinCapability = 80;  // mma.m16n8k16 and cp.async

// Torch's current stream. Looked up when called: the library loads where torch has no CUDA.
cudaStream_t current_stream(int32_t device) {
  using Get = int32_t (*)(int32_t device, void** stream);
  static const Get get =
      reinterpret_cast<Get>(dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  STD_TORCH_CHECK(get != nullptr, "this torch was built without CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(get(device, &stream) == 0, "torch has no current stream on cuda:", device);
  return static_cast<cudaStream_t>(stream);
}

void check_device(const char* name, const Tensor& x, const Tensor& q) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == q.get_device_index(), name,
                  " must be on cuda:", q.get_device_index(), " as q is, got ",
                  x.is_cuda() ? "cuda:" : "another device", x.is_cuda() ? x.get_device_index() : 0);
}

void check_contiguous(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 1 && (x.size(0) <= 1 || x.stride(0) == 1), name,
                  " must have 1 dim of stride 1, got ", x.dim(), " dims");
}

std::tuple<Tensor, Tensor> forward(const Inputs& in, const CacheInputs* cache, bool bshd) {
  const int32_t index = in.q.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const cuda::Device device = cuda::current_device();
  STD_TORCH_CHECK(device.capability >= kMinCapability,
                  "the device must have compute capability 8.0 or more, got ",
                  device.capability / 10, ".", device.capability % 10);
  check_inputs(in, cache, check_device);
  // Kernels read these as arrays, and the host can't copy them.
  check_contiguous("head_map", in.head_map);
  if (in.value_head_map) check_contiguous("value_head_map", *in.value_head_map);
  if (in.sinks) check_contiguous("sinks", *in.sinks);
  STD_TORCH_CHECK(in.dropout_p == 0, "dropout_p must be 0 on CUDA, got ", in.dropout_p);
  if (cache && cache->q_offsets) {
    STD_TORCH_CHECK(cache->max_q_len >= 0 && cache->max_q_len <= in.q.size(2),
                    "max_q_len must be 0 to q.shape[2] (", in.q.size(2), "), got ",
                    cache->max_q_len);
  }
  if (cache && cache->kv_begin) check_contiguous("kv_begin", *cache->kv_begin);
  if (cache && cache->q_offsets) check_contiguous("q_offsets", *cache->q_offsets);

  AttentionParams params = params_of(in, cache);
  Outputs outputs = add_outputs(params, in.q, bshd);
  const cuda::Phase phase = cuda::choose_phase(params, device);
  // From torch's allocator, which keeps the memory until the stream is past it.
  const auto bytes = static_cast<int64_t>(cuda::workspace_bytes(params, phase, device));
  Tensor workspace = torch::stable::new_empty(in.q, {bytes}, ScalarType::Byte);
  cuda::attention_forward(params, phase, workspace.mutable_data_ptr(), device,
                          current_stream(index));
  return {outputs.out, outputs.lse};
}

}  // namespace

std::tuple<Tensor, Tensor> attention_forward_cuda(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& head_map,
    const OptionalTensor& value_head_map, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, const OptionalTensor& attn_mask, const OptionalTensor& kv_lengths,
    double scale, int64_t window_left, int64_t window_right, double softcap, bool bshd,
    double dropout_p, const OptionalTensor& dropout_seed) {
  return forward({q, k, v, head_map, value_head_map, alibi_slopes, sinks, attn_mask, kv_lengths,
                  scale, window_left, window_right, softcap, dropout_p, dropout_seed},
                 nullptr, bshd);
}

std::tuple<Tensor, Tensor> cache_attention_forward_cuda(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& head_map,
    const OptionalTensor& value_head_map, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, const OptionalTensor& attn_mask, const Tensor& kv_lengths,
    const OptionalTensor& page_table, const OptionalTensor& kv_begin,
    const OptionalTensor& q_offsets, int64_t max_q_len, const OptionalTensor& k_scale,
    const OptionalTensor& v_scale, const OptionalTensor& k_zero, const OptionalTensor& v_zero,
    double scale, int64_t window_left, int64_t window_right, double softcap, bool bshd) {
  const OptionalTensor lengths = kv_lengths, no_seed;
  const CacheInputs cache{page_table, kv_begin, q_offsets, max_q_len,
                          k_scale,    v_scale,  k_zero,    v_zero};
  return forward({q, k, v, head_map, value_head_map, alibi_slopes, sinks, attn_mask, lengths, scale,
                  window_left, window_right, softcap, 0.0, no_seed},
                 &cache, bshd);
}

}  // namespace gqa::host
