#include "attention.h"

#include <memory>

#include "../cpu/forward/attention.h"
#include "call.h"

namespace gqa::host {

std::tuple<Tensor, Tensor> attention_forward_cpu(const Inputs& in, bool bshd) {
  Call call(in);
  const Tensor out = add_output(call.params, in.q, bshd), lse = add_lse(call.params, in.q);
  cpu::attention_forward(call.params, torch_threads(), true, in.batch_invariant, call.key_ranges);
  return {out, lse};
}

Tensor attention_output_cpu(const Inputs& in, bool bshd) {
  Call call(in);
  const Tensor out = add_unfilled_output(call.params, in.q, bshd);
  const std::unique_ptr<float[]> lse(new float[in.q.size(0) * in.q.size(1) * in.q.size(2)]);
  call.params.lse = lse.get();
  cpu::attention_forward(call.params, torch_threads(), false, in.batch_invariant, call.key_ranges);
  return out;
}

}  // namespace gqa::host
