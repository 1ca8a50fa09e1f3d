#include "append_inputs.h"

#include <torch/csrc/stable/ops.h>

#include <tuple>

namespace gqa::host {
namespace {

using CheckDevice = void (*)(const char* name, const Tensor& x, const Tensor& q);

// Checks a table of cosines or sines for the first rotary_dim elements.
void check_rotary(const char* name, const Tensor& x, const Tensor& k_new, int64_t head_dim,
                  CheckDevice check_device) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == k_new.scalar_type(),
                  name, " must have dtype Float or k_new's, got ",
                  torch::headeronly::toString(x.scalar_type()));
  check_device(name, x, k_new);
  check_last_dim_contiguous(name, x);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) >= 1 && 2 * x.size(1) <= head_dim, name,
                  " must have shape [positions, R / 2] with R at most ", head_dim);
}

void set_rotary(AppendParams& params, const AppendInputs& in, CheckDevice check_device) {
  const int64_t head_dim = params.cache.head_dim;
  check_rotary("rotary_cos", *in.rotary_cos, in.k_new, head_dim, check_device);
  check_rotary("rotary_sin", *in.rotary_sin, in.k_new, head_dim, check_device);
  check_shape("rotary_sin", *in.rotary_sin, {in.rotary_cos->size(0), in.rotary_cos->size(1)});
  const auto dtype_of = [&](const Tensor& x) {
    return x.scalar_type() == ScalarType::Float ? DType::kFloat32 : params.dtype;
  };
  params.rotary_cos = in.rotary_cos->const_data_ptr();
  params.rotary_sin = in.rotary_sin->const_data_ptr();
  params.cos_stride = in.rotary_cos->stride(0);
  params.sin_stride = in.rotary_sin->stride(0);
  params.cos_dtype = dtype_of(*in.rotary_cos);
  params.sin_dtype = dtype_of(*in.rotary_sin);
  params.rotary_positions = in.rotary_cos->size(0);
  params.rotary_dim = 2 * in.rotary_cos->size(1);
  params.rotary_interleaved = in.rotary_interleaved;
}

// Checks the memory of a cache's scales or zeros.
float* writable(OptionalTensor& x) {
  return x ? static_cast<float*>(x->mutable_data_ptr()) : nullptr;
}

bool one_for_each_row(const OptionalTensor& x) { return x && x->stride(2) != 0; }

}  // namespace

AppendedCache::AppendedCache(const AppendInputs& in)
    : in_(in),
      lengths_(in.kv_lengths),
      head_map_(empty_beside(in.kv_lengths, ScalarType::Int,
                             {in.k_new.dim() == 4 ? in.k_new.size(1) : 0}, {1})) {}

Inputs AppendedCache::inputs() const {
  return {in_.k_new,    in_.k,
          in_.v,        head_map_,
          none_,        none_,
          none_,        none_,
          lengths_,     in_.page_table,
          in_.kv_begin, in_.new_offsets,
          in_.max_new,  0,
          in_.k_scale,  in_.v_scale,
          in_.k_zero,   in_.v_zero,
          1.0,          -1,
          -1,           0.0,
          false,        0.0,
          none_,        none_};
}

AppendParams params_of(const AppendInputs& in, const AttentionParams& cache,
                       CheckDevice check_device) {
  AppendParams params{};
  params.cache = cache;
  params.num_tokens = in.k_new.size(2);
  params.dtype = cache.dtype;
  const int64_t batch = in.k_new.size(0), head_dim = cache.head_dim;
  const int64_t heads = in.q && in.q->dim() == 4 ? in.q->size(1) : 0;
  check_dtype("v_new", in.v_new, in.k_new.scalar_type());
  check_device("v_new", in.v_new, in.k_new);
  check_last_dim_contiguous("v_new", in.v_new);
  check_shape("k_new", in.k_new, {batch, in.k.size(1), params.num_tokens, head_dim});
  check_shape("v_new", in.v_new, {batch, in.v.size(1), params.num_tokens, cache.value_head_dim});
  // The first key head's length is the sequence's.
  STD_TORCH_CHECK(in.k.size(1) >= 1, "k must have at least 1 head, got 0");
  STD_TORCH_CHECK(!in.rotary_cos == !in.rotary_sin,
                  "rotary_cos and rotary_sin must be given together");
  if (in.q) {
    check_dtype("q", *in.q, in.k_new.scalar_type());
    check_device("q", *in.q, in.k_new);
    check_last_dim_contiguous("q", *in.q);
    check_shape("q", *in.q, {batch, heads, params.num_tokens, head_dim});
    STD_TORCH_CHECK(in.rotary_cos, "rotary_cos must be given with q");
  }
  if (in.rotary_cos) set_rotary(params, in, check_device);

  params.cache.num_heads = heads;
  params.k = in.k.mutable_data_ptr();
  params.v = in.v.mutable_data_ptr();
  params.k_dynamic = one_for_each_row(in.k_scale);
  params.v_dynamic = one_for_each_row(in.v_scale);
  for (const auto& [name, scale, zero] :
       {std::tuple{"k_zero", &in.k_scale, &in.k_zero}, {"v_zero", &in.v_scale, &in.v_zero}}) {
    STD_TORCH_CHECK(!*zero || one_for_each_row(*zero) == one_for_each_row(*scale), name,
                    " must hold one number for each row where its scale does");
  }
  params.k_scale = writable(in.k_scale);
  params.v_scale = writable(in.v_scale);
  params.k_zero = writable(in.k_zero);
  params.v_zero = writable(in.v_zero);
  params.k_new = in.k_new.const_data_ptr();
  params.v_new = in.v_new.const_data_ptr();
  params.k_new_stride = strides_of(in.k_new);
  params.v_new_stride = strides_of(in.v_new);
  params.new_offsets = cache.q_offsets;
  return params;
}

Tensor add_rotated(AppendParams& params, const AppendInputs& in) {
  if (!in.q) return empty_beside(in.k_new, in.k_new.scalar_type(), {0}, {1});
  Tensor rotated = torch::stable::empty_like(*in.q);
  params.q = in.q->const_data_ptr();
  params.q_rotated = rotated.mutable_data_ptr();
  params.q_stride = strides_of(*in.q);
  params.q_rotated_stride = strides_of(rotated);
  return rotated;
}

}  // namespace gqa::host
