#include "gradients.h"

#include <vector>

#include "allocate.h"

namespace gqa::host {

void check_results(const Inputs& in, const Results& results,
                   void (*check_device)(const char* name, const Tensor& x, const Tensor& q)) {
  const auto& [dout, dlse, out, lse, need_slopes, need_sinks] = results;
  const Tensor& q = in.q;
  check_dtype("k", in.k, q.scalar_type());
  STD_TORCH_CHECK(!in.kv_begin == !in.q_offsets, "kv_begin and q_offsets must be given together");
  if (in.q_offsets) {
    STD_TORCH_CHECK(in.k.size(0) == 1, "k must have one row of packed sequences, got ",
                    in.k.size(0));
    STD_TORCH_CHECK(in.max_kv_len >= 0 && in.max_kv_len <= in.k.size(2),
                    "max_kv_len must be 0 to k.shape[2] (", in.k.size(2), "), got ", in.max_kv_len);
  }
  check_dtype("dout", dout, q.scalar_type());
  check_dtype("out", out, q.scalar_type());
  check_dtype("lse", lse, ScalarType::Float);
  if (dlse) check_dtype("dlse", *dlse, ScalarType::Float);
  check_device("dout", dout, q);
  check_device("out", out, q);
  check_device("lse", lse, q);
  if (dlse) check_device("dlse", *dlse, q);
  check_last_dim_contiguous("dout", dout);
  check_last_dim_contiguous("out", out);
  for (const auto& [name, x] : {std::pair{"dout", &dout}, {"out", &out}}) {
    check_shape(name, *x, {q.size(0), q.size(1), q.size(2), in.v.size(3)});
  }
  for (const auto& [name, x] : {std::pair{"lse", &lse}, {"dlse", dlse ? &*dlse : &lse}}) {
    check_shape(name, *x, {q.size(0), q.size(1), q.size(2)});
    STD_TORCH_CHECK(x->is_contiguous(), name, " must be contiguous");
  }
  STD_TORCH_CHECK(!need_slopes || in.alibi_slopes, "alibi_slopes must be given with need_slopes");
  STD_TORCH_CHECK(!need_sinks || in.sinks, "sinks must be given with need_sinks");
}

std::pair<Gradients, BackwardParams> add_gradients(const AttentionParams& call, const Inputs& in,
                                                   const Results& results) {
  const bool packed = call.q_offsets != nullptr;
  const auto like = [&](const char* name, const Tensor& x) {
    const auto sizes = x.sizes();
    if (!packed) return new_result(name, x, {sizes.begin(), sizes.end()}, x.scalar_type());
    return torch::stable::new_zeros(x, {1, x.size(1), x.size(2), x.size(3)});
  };
  const auto floats = [&](bool needed, std::vector<int64_t> sizes) {
    return new_result("a gradient of attention", in.q, needed ? sizes : std::vector<int64_t>{0},
                      ScalarType::Float);
  };
  Gradients gradients{like("dq of attention", in.q), like("dk of attention", in.k),
                      like("dv of attention", in.v),
                      floats(results.need_slopes, {call.batch, call.num_heads}),
                      floats(results.need_sinks, {call.num_heads})};
  const auto& [dq, dk, dv, dslopes, dsinks] = gradients;

  BackwardParams params{};
  params.call = call;
  params.max_kv_len = packed ? in.max_kv_len : in.k.size(2);
  // The kernels only read the results of the forward.
  params.call.out = const_cast<void*>(results.out.const_data_ptr());
  params.call.lse = static_cast<float*>(const_cast<void*>(results.lse.const_data_ptr()));
  params.call.out_stride = strides_of(results.out);
  params.dout = results.dout.const_data_ptr();
  params.dout_stride = strides_of(results.dout);
  if (results.dlse) params.dlse = static_cast<const float*>(results.dlse->const_data_ptr());
  params.dq = dq.mutable_data_ptr();
  params.dk = dk.mutable_data_ptr();
  params.dv = dv.mutable_data_ptr();
  params.dq_stride = strides_of(dq);
  params.dk_stride = strides_of(dk);
  params.dv_stride = strides_of(dv);
  if (packed) params.dk_stride.b = params.dv_stride.b = 0;
  if (results.need_slopes) params.dslopes = static_cast<float*>(dslopes.mutable_data_ptr());
  if (results.need_sinks) params.dsinks = static_cast<float*>(dsinks.mutable_data_ptr());
  return {gradients, params};
}

}  // namespace gqa::host
