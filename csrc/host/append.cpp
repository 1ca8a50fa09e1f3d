#include "append.h"

#include <torch/csrc/stable/ops.h>

#include <utility>

#include "../cpu/append.h"
#include "call.h"

namespace gqa::host {
namespace {

// Checked: what is given as a table of the first rotary_dim numbers' cosines or sines.
void check_rotary(const char* name, const Tensor& x, const Tensor& k_new, int64_t head_dim) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == k_new.scalar_type(),
                  name, " must have dtype Float or k_new's, got ",
                  torch::headeronly::toString(x.scalar_type()));
  check_cpu(name, x, k_new);
  check_last_dim_contiguous(name, x);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) >= 1 && 2 * x.size(1) <= head_dim, name,
                  " must have shape [positions, R / 2] with R at most ", head_dim);
}

// Of the memory of a cache's scales or zeros.
float* writable(OptionalTensor& x) {
  return x ? static_cast<float*>(x->mutable_data_ptr()) : nullptr;
}

bool one_for_each_row(const OptionalTensor& x) { return x && x->stride(2) != 0; }

}  // namespace

Tensor cache_append_cpu(const OptionalTensor& q, const Tensor& k_new, const Tensor& v_new, Tensor k,
                        Tensor v, const Tensor& kv_lengths, const OptionalTensor& page_table,
                        const OptionalTensor& kv_begin, const OptionalTensor& new_offsets,
                        OptionalTensor k_scale, OptionalTensor v_scale, OptionalTensor k_zero,
                        OptionalTensor v_zero, const OptionalTensor& rotary_cos,
                        const OptionalTensor& rotary_sin, bool rotary_interleaved) {
  // A cache is checked as for attention with k_new as queries, each of a head of its own.
  const Tensor head_map =
      torch::stable::new_zeros(kv_lengths, {k_new.dim() == 4 ? k_new.size(1) : 0});
  const OptionalTensor lengths = kv_lengths, none;
  const CacheInputs cache{page_table, kv_begin, new_offsets, k_new.dim() == 4 ? k_new.size(2) : 0,
                          k_scale,    v_scale,  k_zero,      v_zero};
  const Call call({k_new, k, v, head_map, none, none, none, none, lengths, 1.0, -1, -1, 0.0, 0.0,
                   none},
                  &cache);

  AppendParams params{};
  params.cache = call.params;
  params.num_tokens = k_new.size(2);
  params.dtype = call.params.dtype;
  const int64_t batch = k_new.size(0), head_dim = call.params.head_dim;
  const int64_t heads = q && q->dim() == 4 ? q->size(1) : 0;
  check_dtype("v_new", v_new, k_new.scalar_type());
  check_cpu("v_new", v_new, k_new);
  check_last_dim_contiguous("v_new", v_new);
  check_shape("k_new", k_new, {batch, k.size(1), params.num_tokens, head_dim});
  check_shape("v_new", v_new, {batch, v.size(1), params.num_tokens, call.params.value_head_dim});
  STD_TORCH_CHECK(!rotary_cos == !rotary_sin, "rotary_cos and rotary_sin must be given together");
  if (q) {
    check_dtype("q", *q, k_new.scalar_type());
    check_cpu("q", *q, k_new);
    check_last_dim_contiguous("q", *q);
    check_shape("q", *q, {batch, heads, params.num_tokens, head_dim});
    STD_TORCH_CHECK(rotary_cos, "rotary_cos must be given with q");
  }
  if (rotary_cos) {
    check_rotary("rotary_cos", *rotary_cos, k_new, head_dim);
    check_rotary("rotary_sin", *rotary_sin, k_new, head_dim);
    check_shape("rotary_sin", *rotary_sin, {rotary_cos->size(0), rotary_cos->size(1)});
    params.rotary_cos = rotary_cos->const_data_ptr();
    params.rotary_sin = rotary_sin->const_data_ptr();
    params.cos_stride = rotary_cos->stride(0);
    params.sin_stride = rotary_sin->stride(0);
    params.cos_dtype =
        rotary_cos->scalar_type() == ScalarType::Float ? DType::kFloat32 : params.dtype;
    params.sin_dtype =
        rotary_sin->scalar_type() == ScalarType::Float ? DType::kFloat32 : params.dtype;
    params.rotary_positions = rotary_cos->size(0);
    params.rotary_dim = 2 * rotary_cos->size(1);
    params.rotary_interleaved = rotary_interleaved;
  }

  params.cache.num_heads = heads;
  params.k = k.mutable_data_ptr();
  params.v = v.mutable_data_ptr();
  params.k_dynamic = one_for_each_row(k_scale);
  params.v_dynamic = one_for_each_row(v_scale);
  for (const auto& [name, scale, zero] :
       {std::tuple{"k_zero", &k_scale, &k_zero}, {"v_zero", &v_scale, &v_zero}}) {
    STD_TORCH_CHECK(!*zero || one_for_each_row(*zero) == one_for_each_row(*scale), name,
                    " must hold one number for each row where its scale does");
  }
  params.k_scale = writable(k_scale);
  params.v_scale = writable(v_scale);
  params.k_zero = writable(k_zero);
  params.v_zero = writable(v_zero);
  params.k_new = k_new.const_data_ptr();
  params.v_new = v_new.const_data_ptr();
  params.k_new_stride = strides_of(k_new);
  params.v_new_stride = strides_of(v_new);
  params.new_offsets = call.params.q_offsets;

  Tensor q_rotated = q ? torch::stable::empty_like(*q) : torch::stable::new_empty(k_new, {0});
  if (q) {
    params.q = q->const_data_ptr();
    params.q_rotated = q_rotated.mutable_data_ptr();
    params.q_stride = strides_of(*q);
    params.q_rotated_stride = strides_of(q_rotated);
  }
  cpu::cache_append(params, torch_threads());
  return q_rotated;
}

}  // namespace gqa::host
