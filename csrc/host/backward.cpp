#include "backward.h"

#include "../cpu/backward/backward.h"
#include "call.h"

namespace gqa::host {

Gradients attention_backward_cpu(
    const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& head_map,
    const OptionalTensor& value_head_map, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, const OptionalTensor& attn_mask, const OptionalTensor& kv_lengths,
    double scale, int64_t window_left, int64_t window_right, double softcap, double dropout_p,
    const OptionalTensor& dropout_seed, bool need_slopes, bool need_sinks) {
  const Inputs in{q,       k,         v,           head_map, value_head_map, alibi_slopes,
                  sinks,   attn_mask, kv_lengths,  scale,    window_left,    window_right,
                  softcap, dropout_p, dropout_seed};
  const Results results{dout, dlse, out, lse, need_slopes, need_sinks};
  const Call call(in);
  check_results(in, results, check_cpu);
  auto [gradients, params] = add_gradients(call.params, in, results, in.k.size(2));
  cpu::attention_backward(params, torch_threads());
  return gradients;
}

}  // namespace gqa::host
