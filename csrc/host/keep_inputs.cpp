#include "keep_inputs.h"

#include <utility>

namespace gqa::host {
namespace {

float* rows_of_their_own(OptionalTensor& x) {
  return x && x->stride(2) != 0 ? static_cast<float*>(x->mutable_data_ptr()) : nullptr;
}

int64_t element_bytes(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half: return 2;
    default: return 1;
  }
}

KeptSide side_of(Tensor& x, OptionalTensor& scale, OptionalTensor& zero) {
  return {x.mutable_data_ptr(), rows_of_their_own(scale), rows_of_their_own(zero),
          x.size(3) * element_bytes(x), element_bytes(x)};
}

Tensor no_queries(const KeepInputs& in) {
  const Tensor& k = in.k;
  STD_TORCH_CHECK(k.dim() == 4, "k must have 4 dims, got ", k.dim());
  STD_TORCH_CHECK(in.kv_lengths.dim() == 2, "kv_lengths must have 2 dims, [B, Hk], got ",
                  in.kv_lengths.dim());
  const ScalarType dtype = element_bytes(k) > 1 ? k.scalar_type() : ScalarType::Float;
  const int64_t dim = k.size(3) * (k.scalar_type() == ScalarType::Byte ? 2 : 1);
  return empty_beside(k, dtype, {in.kv_lengths.size(0), 0, 0, dim}, {dim, dim, dim, 1});
}

}  // namespace

KeptCache::KeptCache(const KeepInputs& in)
    : in_(in),
      lengths_(in.kv_lengths),
      q_(no_queries(in)),
      head_map_(empty_beside(in.kv_lengths, ScalarType::Int, {0}, {1})) {}

Inputs KeptCache::inputs() const {
  return {
      q_,         in_.k,          in_.v,        head_map_, none_, none_, none_,       none_,
      lengths_,   in_.page_table, in_.kv_begin, none_,     0,     0,     in_.k_scale, in_.v_scale,
      in_.k_zero, in_.v_zero,     1.0,          -1,        -1,    0.0,   false,       0.0,
      none_,      none_};
}

KeepParams params_of(const KeepInputs& in, const AttentionParams& cache,
                     void (*check_device)(const char* name, const Tensor& x, const Tensor& q)) {
  const Tensor &indices = in.indices, &counts = in.counts;
  for (const auto& [name, x] : {std::pair{"indices", &indices}, {"counts", &counts}}) {
    check_dtype(name, *x, ScalarType::Int);
    check_device(name, *x, in.k);
  }
  STD_TORCH_CHECK(indices.dim() == 3, "indices must have 3 dims, [B, Hk, n], got ", indices.dim());
  check_shape("indices", indices, {cache.batch, cache.num_k_heads, indices.size(2)});
  check_shape("counts", counts, {cache.batch, cache.num_k_heads});

  KeepParams params{};
  params.cache = cache;
  params.k = side_of(in.k, in.k_scale, in.k_zero);
  params.v = side_of(in.v, in.v_scale, in.v_zero);
  params.indices = static_cast<const int32_t*>(indices.const_data_ptr());
  params.index_stride_b = indices.stride(0);
  params.index_stride_h = indices.stride(1);
  params.index_stride_n = indices.stride(2);
  params.num_indices = indices.size(2);
  params.counts = static_cast<const int32_t*>(counts.const_data_ptr());
  params.count_stride_b = counts.stride(0);
  params.count_stride_h = counts.stride(1);
  return params;
}

}  // namespace gqa::host
