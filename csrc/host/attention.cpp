#include "attention.h"

#include <memory>

#include "../cpu/attention.h"
#include "call.h"

namespace gqa::host {

std::tuple<Tensor, Tensor> attention_forward_cpu(const Inputs& in, bool bshd, bool lse_wanted) {
  Call call(in);
  AttentionParams& params = call.params;
  Outputs outputs = add_outputs(params, in.q, bshd, lse_wanted);
  std::unique_ptr<float[]> scratch;
  if (!lse_wanted) {
    scratch.reset(new float[in.q.size(0) * in.q.size(1) * in.q.size(2)]);
    params.lse = scratch.get();
  }
  cpu::attention_forward(params, torch_threads(), lse_wanted);
  return {outputs.out, outputs.lse};
}

}  // namespace gqa::host
