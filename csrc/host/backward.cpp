#include "backward.h"

#include <torch/csrc/stable/ops.h>

#include "../cpu/backward.h"
#include "call.h"

namespace gqa::host {
namespace {

void check_forward_results(const Tensor& dout, const OptionalTensor& dlse, const Tensor& out,
                           const Tensor& lse, const Tensor& q, const Tensor& v) {
  check_dtype("dout", dout, q.scalar_type());
  check_dtype("out", out, q.scalar_type());
  check_dtype("lse", lse, ScalarType::Float);
  if (dlse) check_dtype("dlse", *dlse, ScalarType::Float);
  check_cpu("dout", dout, q);
  check_cpu("out", out, q);
  check_cpu("lse", lse, q);
  if (dlse) check_cpu("dlse", *dlse, q);
  check_last_dim_contiguous("dout", dout);
  check_last_dim_contiguous("out", out);
  for (const auto& [name, x] : {std::pair{"dout", &dout}, {"out", &out}}) {
    check_shape(name, *x, {q.size(0), q.size(1), q.size(2), v.size(3)});
  }
  for (const auto& [name, x] : {std::pair{"lse", &lse}, {"dlse", dlse ? &*dlse : &lse}}) {
    check_shape(name, *x, {q.size(0), q.size(1), q.size(2)});
    STD_TORCH_CHECK(x->is_contiguous(), name, " must be contiguous");
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward_cpu(
    const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& head_map,
    const OptionalTensor& value_head_map, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, const OptionalTensor& attn_mask, const OptionalTensor& kv_lengths,
    double scale, int64_t window_left, int64_t window_right, double softcap, double dropout_p,
    const OptionalTensor& dropout_seed, bool need_slopes, bool need_sinks) {
  Call call({q, k, v, head_map, value_head_map, alibi_slopes, sinks, attn_mask, kv_lengths, scale,
             window_left, window_right, softcap, dropout_p, dropout_seed});
  check_forward_results(dout, dlse, out, lse, q, v);
  STD_TORCH_CHECK(!need_slopes || alibi_slopes, "alibi_slopes must be given with need_slopes");
  STD_TORCH_CHECK(!need_sinks || sinks, "sinks must be given with need_sinks");

  const int64_t batch = q.size(0), heads = q.size(1);
  Tensor dq = torch::stable::new_empty(q, q.sizes());
  Tensor dk = torch::stable::new_empty(k, k.sizes());
  Tensor dv = torch::stable::new_empty(v, v.sizes());
  Tensor dslopes = torch::stable::new_empty(
      q, need_slopes ? std::vector<int64_t>{batch, heads} : std::vector<int64_t>{0},
      ScalarType::Float);
  Tensor dsinks = torch::stable::new_empty(
      q, need_sinks ? std::vector<int64_t>{heads} : std::vector<int64_t>{0}, ScalarType::Float);

  BackwardParams params{};
  params.call = call.params;
  // The kernels only read the forward's results.
  params.call.out = const_cast<void*>(out.const_data_ptr());
  params.call.lse = static_cast<float*>(const_cast<void*>(lse.const_data_ptr()));
  params.call.out_stride = strides_of(out);
  params.dout = dout.const_data_ptr();
  params.dout_stride = strides_of(dout);
  if (dlse) params.dlse = static_cast<const float*>(dlse->const_data_ptr());
  params.dq = dq.mutable_data_ptr();
  params.dk = dk.mutable_data_ptr();
  params.dv = dv.mutable_data_ptr();
  params.dq_stride = strides_of(dq);
  params.dk_stride = strides_of(dk);
  params.dv_stride = strides_of(dv);
  if (need_slopes) params.dslopes = static_cast<float*>(dslopes.mutable_data_ptr());
  if (need_sinks) params.dsinks = static_cast<float*>(dsinks.mutable_data_ptr());

  cpu::attention_backward(params, torch_threads());
  return {dq, dk, dv, dslopes, dsinks};
}

}  // namespace gqa::host
