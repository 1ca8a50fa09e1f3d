#include "keep.h"

#include "../cpu/keep/keep.h"
#include "call.h"

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

cpu::KeptSide side_of(Tensor& x, OptionalTensor& scale, OptionalTensor& zero) {
  return {x.mutable_data_ptr(), rows_of_their_own(scale), rows_of_their_own(zero),
          x.size(3) * element_bytes(x), element_bytes(x)};
}

}  // namespace

void cache_keep_cpu(const Tensor& indices, const Tensor& counts, Tensor k, Tensor v,
                    const Tensor& kv_lengths, const OptionalTensor& page_table,
                    const OptionalTensor& kv_begin, OptionalTensor k_scale, OptionalTensor v_scale,
                    OptionalTensor k_zero, OptionalTensor v_zero) {
  STD_TORCH_CHECK(k.dim() == 4, "k must have 4 dims, got ", k.dim());
  STD_TORCH_CHECK(kv_lengths.dim() == 2, "kv_lengths must have 2 dims, [B, Hk], got ",
                  kv_lengths.dim());
  const int64_t batch = kv_lengths.size(0), heads = k.size(1);
  // Presents the op as a call without queries over the same cache, whose checks are the ones
  // needed.
  const bool plain = element_bytes(k) > 1;
  const int64_t dim = k.size(3) * (k.scalar_type() == ScalarType::Byte ? 2 : 1);
  const Tensor q = empty_beside(k, plain ? k.scalar_type() : ScalarType::Float, {batch, 0, 0, dim},
                                {dim, dim, dim, 1});
  const Tensor head_map = empty_beside(kv_lengths, ScalarType::Int, {0}, {1});
  const OptionalTensor lengths(kv_lengths), none;
  const Inputs inputs{q,       k,       v,          head_map, none, none, none,
                      none,    lengths, page_table, kv_begin, none, 0,    0,
                      k_scale, v_scale, k_zero,     v_zero,   1.0,  -1,   -1,
                      0.0,     false,   0.0,        none,     none};
  const Call call(inputs);
  for (const auto& [name, x] : {std::pair{"indices", &indices}, {"counts", &counts}}) {
    check_dtype(name, *x, ScalarType::Int);
    check_cpu(name, *x, *x);
  }
  STD_TORCH_CHECK(indices.dim() == 3, "indices must have 3 dims, [B, Hk, n], got ", indices.dim());
  check_shape("indices", indices, {batch, heads, indices.size(2)});
  check_shape("counts", counts, {batch, heads});

  cpu::KeepParams params{};
  params.cache = call.params;
  params.k = side_of(k, k_scale, k_zero);
  params.v = side_of(v, v_scale, v_zero);
  params.indices = static_cast<const int32_t*>(indices.const_data_ptr());
  params.index_stride_b = indices.stride(0);
  params.index_stride_h = indices.stride(1);
  params.index_stride_n = indices.stride(2);
  params.num_indices = indices.size(2);
  params.counts = static_cast<const int32_t*>(counts.const_data_ptr());
  params.count_stride_b = counts.stride(0);
  params.count_stride_h = counts.stride(1);
  cpu::cache_keep(params, torch_threads());
}

}  // namespace gqa::host
