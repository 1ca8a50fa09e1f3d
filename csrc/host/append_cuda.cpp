#include <torch/csrc/stable/accelerator.h>

#include "../cuda/sm80/append/launch.h"
#include "append.h"
#include "append_inputs.h"
#include "call_cuda.h"

namespace gqa::host {

Tensor cache_append_cuda(const OptionalTensor& q, const Tensor& k_new, const Tensor& v_new,
                         Tensor k, Tensor v, const Tensor& kv_lengths,
                         const OptionalTensor& page_table, const OptionalTensor& kv_begin,
                         const OptionalTensor& new_offsets, OptionalTensor k_scale,
                         OptionalTensor v_scale, OptionalTensor k_zero, OptionalTensor v_zero,
                         const OptionalTensor& rotary_cos, const OptionalTensor& rotary_sin,
                         bool rotary_interleaved) {
  const int32_t index = k_new.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const AppendInputs in{
      q,           k_new,   v_new,   k,      v,      kv_lengths, page_table, kv_begin,
      new_offsets, k_scale, v_scale, k_zero, v_zero, rotary_cos, rotary_sin, rotary_interleaved};
  const AppendedCache appended(in);
  const Inputs inputs = appended.inputs();
  const CacheInputs cache = appended.cache();
  const cuda::Device device = check_cuda_call(inputs, &cache);
  AppendParams params = params_of(in, params_of(inputs, &cache), check_cuda);
  Tensor rotated = add_rotated(params, in);
  const std::string reason = cuda::sm80::append_unsupported(params);
  STD_TORCH_CHECK(reason.empty(), "no CUDA kernel can run this append: ", reason);
  cuda::sm80::append(params, nullptr, device.num_sms, current_stream(index));
  return rotated;
}

}  // namespace gqa::host
