#include "attention.h"

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "../core/params.h"
#include "../cpu/attention.h"
#include "checks.h"

namespace gqa::host {
namespace {

void check_cpu(const char* name, const Tensor& x, const Tensor&) {
  STD_TORCH_CHECK(x.is_cpu(), name, " must be on the CPU, got another device");
}

// The elements of a small 1-D tensor, whatever its stride.
template <class T>
std::vector<T> elements_of(const Tensor& x) {
  const T* data = static_cast<const T*>(x.const_data_ptr());
  std::vector<T> elements(x.numel());
  for (size_t i = 0; i < elements.size(); ++i)
    elements[i] = data[static_cast<int64_t>(i) * x.stride(0)];
  return elements;
}

cpu::ThreadPool torch_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int64_t n, void (*body)(void*, int64_t), void* context) {
            torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body(context, i);
            });
          }};
}

}  // namespace

std::tuple<Tensor, Tensor> attention_forward_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& head_map,
    const OptionalTensor& value_head_map, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, const OptionalTensor& attn_mask, const OptionalTensor& kv_lengths,
    double scale, int64_t window_left, int64_t window_right, double softcap, bool bshd) {
  const Inputs in{q,         k,          v,     head_map,    value_head_map, alibi_slopes, sinks,
                  attn_mask, kv_lengths, scale, window_left, window_right,   softcap,      bshd};
  check_inputs(in, nullptr, check_cpu);
  Outputs outputs = empty_outputs(in);
  AttentionParams params = params_of(in, nullptr, outputs);

  const std::vector<int32_t> key_map = elements_of<int32_t>(head_map);
  std::vector<int32_t> value_map;
  std::vector<float> sink_logits;
  params.head_map = key_map.data();
  if (value_head_map) {
    value_map = elements_of<int32_t>(*value_head_map);
    params.value_head_map = value_map.data();
  }
  if (sinks) {
    sink_logits = elements_of<float>(*sinks);
    params.sinks = sink_logits.data();
  }
  cpu::attention_forward(params, torch_threads());
  return {outputs.out, outputs.lse};
}

}  // namespace gqa::host
