#include "attention.h"

#include <cstring>
#include <memory>

#include "../cpu/forward/attention.h"
#include "allocate.h"
#include "call.h"

namespace gqa::host {

std::tuple<Tensor, Tensor> attention_forward_cpu(const Inputs& in, bool bshd) {
  Call call(in);
  const Tensor out = add_output(call.params, in.q, bshd), lse = add_lse(call.params, in.q);
  cpu::attention_forward(call.params, torch_threads(), true, in.batch_invariant, call.key_ranges);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_auxiliary_cpu(const Inputs& in, bool bshd,
                                                                   bool max_scores,
                                                                   int64_t key_scores) {
  Call call(in);
  const AttentionParams& params = call.params;
  STD_TORCH_CHECK(key_scores >= 0, "key_scores must be non-negative, got ", key_scores);
  const Tensor out = add_output(call.params, in.q, bshd), lse = add_lse(call.params, in.q);
  const Tensor most = new_result(
      "max_scores", in.q, {max_scores ? params.batch : 0, params.num_heads}, ScalarType::Float);
  const Tensor sums = new_result(
      "key_scores", in.q, {key_scores > 0 ? params.batch : 0, params.num_k_heads, params.kv_len},
      ScalarType::Float);
  cpu::Auxiliary wanted;
  if (max_scores) wanted.max_scores = static_cast<float*>(most.mutable_data_ptr());
  if (key_scores > 0) {
    wanted.key_scores = static_cast<float*>(sums.mutable_data_ptr());
    wanted.queries = key_scores;
    std::memset(wanted.key_scores, 0, sums.numel() * sizeof(float));
  }
  cpu::attention_forward(params, torch_threads(), true, in.batch_invariant, call.key_ranges,
                         wanted);
  return {out, lse, most, sums};
}

void attention_into_cpu(const Inputs& in, bool, OptionalTensor out, OptionalTensor lse) {
  Call call(in);
  AttentionParams& params = call.params;
  const int64_t batch = in.q.size(0), heads = params.num_heads, tokens = params.q_tokens;
  STD_TORCH_CHECK(out, "out must be given");
  check_dtype("out", *out, in.q.scalar_type());
  check_cpu("out", *out, in.q);
  check_last_dim_contiguous("out", *out);
  check_shape("out", *out, {batch, heads, tokens, params.value_head_dim});
  params.out = out->mutable_data_ptr();
  params.out_stride = strides_of(*out);
  std::unique_ptr<float[]> unwanted;
  if (lse) {
    check_dtype("lse", *lse, ScalarType::Float);
    check_cpu("lse", *lse, in.q);
    check_shape("lse", *lse, {batch, heads, tokens});
    STD_TORCH_CHECK(lse->is_contiguous(), "lse must be contiguous");
    params.lse = static_cast<float*>(lse->mutable_data_ptr());
  } else {
    unwanted.reset(new float[batch * heads * tokens]);
    params.lse = unwanted.get();
  }
  cpu::attention_forward(params, torch_threads(), lse.has_value(), in.batch_invariant,
                         call.key_ranges);
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
