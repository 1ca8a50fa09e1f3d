#include "inputs.h"

#include <torch/csrc/stable/ops.h>

#include <initializer_list>
#include <utility>

namespace gqa::host {
namespace {

constexpr int64_t kMaxHeadDim = 256;  // tiles of wider heads would not fit

using NamedTensors = std::initializer_list<std::pair<const char*, const Tensor*>>;

const Tensor* get(const OptionalTensor& x) { return x ? &*x : nullptr; }

Strides strides_of(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

template <class T>
const T* data_of(const OptionalTensor& x) {
  return x ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

void check_dtypes(const Inputs& in, const CacheInputs* cache) {
  STD_TORCH_CHECK(dtype_of("q", in.q) != DType::kBool, "q must be floating point, got Bool");
  check_dtype("k", in.k, in.q.scalar_type());
  check_dtype("v", in.v, in.q.scalar_type());
  check_dtype("head_map", in.head_map, ScalarType::Int);
  for (const auto& [name, x] : NamedTensors{{"value_head_map", get(in.value_head_map)},
                                            {"kv_lengths", get(in.kv_lengths)}}) {
    if (x) check_dtype(name, *x, ScalarType::Int);
  }
  for (const auto& [name, x] :
       NamedTensors{{"alibi_slopes", get(in.alibi_slopes)}, {"sinks", get(in.sinks)}}) {
    if (x) check_dtype(name, *x, ScalarType::Float);
  }
  if (in.attn_mask) {
    const DType mask = dtype_of("attn_mask", *in.attn_mask);
    STD_TORCH_CHECK(mask == DType::kBool || mask == DType::kFloat32 || mask == dtype_of("q", in.q),
                    "attn_mask must have dtype Bool, Float or q's, got ",
                    torch::headeronly::toString(in.attn_mask->scalar_type()));
  }
  if (!cache) return;
  for (const auto& [name, x] : NamedTensors{{"page_table", get(cache->page_table)},
                                            {"kv_begin", get(cache->kv_begin)},
                                            {"q_offsets", get(cache->q_offsets)}}) {
    if (x) check_dtype(name, *x, ScalarType::Int);
  }
  for (const auto& [name, x] : NamedTensors{{"k_scale", get(cache->k_scale)},
                                            {"v_scale", get(cache->v_scale)},
                                            {"k_zero", get(cache->k_zero)},
                                            {"v_zero", get(cache->v_zero)}}) {
    STD_TORCH_CHECK(!x, name, " must be None: k and v have q's dtype");
  }
}

void check_shapes(const Inputs& in, const CacheInputs* cache) {
  const Tensor &q = in.q, &k = in.k, &v = in.v;
  const bool paged = cache && cache->page_table, ragged = cache && cache->q_offsets;
  const int64_t heads = q.size(1), tokens = q.size(2);
  int64_t batch = q.size(0), kv_len = k.size(2);
  if (cache) {
    STD_TORCH_CHECK(in.kv_lengths && in.kv_lengths->dim() == 2,
                    "kv_lengths must have 2 dims, [B, Hk], got ",
                    in.kv_lengths ? in.kv_lengths->dim() : 0);
    batch = in.kv_lengths->size(0);
  }
  if (ragged) {
    STD_TORCH_CHECK(q.size(0) == 1, "q must have shape[0] == 1 with q_offsets, got ", q.size(0));
    STD_TORCH_CHECK(cache->max_q_len >= 0 && cache->max_q_len <= tokens,
                    "max_q_len must be 0 to q.shape[2] (", tokens, "), got ", cache->max_q_len);
    STD_TORCH_CHECK(!in.attn_mask, "attn_mask must be None with q_offsets");
    check_shape("q_offsets", *cache->q_offsets, {batch + 1});
  } else {
    check_shape("q", q, {batch, heads, tokens, q.size(3)});
  }
  // Sequence b of a cache without a table is k[b].
  STD_TORCH_CHECK(paged || k.size(0) == batch || (cache && k.size(0) >= batch),
                  "k must have shape[0] ", cache ? "of at least " : "equal to ", batch, ", got ",
                  k.size(0));
  check_shape("k", k, {k.size(0), k.size(1), k.size(2), q.size(3)});
  check_shape("v", v, {k.size(0), v.size(1), k.size(2), v.size(3)});
  if (paged) {
    STD_TORCH_CHECK(cache->page_table->dim() == 3,
                    "page_table must have 3 dims, [B, Hk, max_pages], got ",
                    cache->page_table->dim());
    check_shape("page_table", *cache->page_table, {batch, k.size(1), cache->page_table->size(2)});
    kv_len = cache->page_table->size(2) * k.size(2);
  }
  if (cache && cache->kv_begin) check_shape("kv_begin", *cache->kv_begin, {batch});
  check_shape("head_map", in.head_map, {heads});
  if (in.value_head_map) check_shape("value_head_map", *in.value_head_map, {heads});
  if (in.alibi_slopes) check_shape("alibi_slopes", *in.alibi_slopes, {batch, heads});
  if (in.sinks) check_shape("sinks", *in.sinks, {heads});
  if (in.attn_mask) check_shape("attn_mask", *in.attn_mask, {batch, heads, tokens, kv_len});
  if (in.kv_lengths) check_shape("kv_lengths", *in.kv_lengths, {batch, k.size(1)});
}

}  // namespace

DType dtype_of(const char* name, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::Bool: return DType::kBool;
    default:
      STD_TORCH_CHECK(false, name, " must have dtype Float, BFloat16, Half or (a mask) Bool, got ",
                      torch::headeronly::toString(x.scalar_type()));
  }
}

void check_inputs(const Inputs& in, const CacheInputs* cache,
                  void (*check_device)(const char* name, const Tensor& x, const Tensor& q)) {
  check_dtypes(in, cache);
  for (const auto& [name, x] : NamedTensors{{"q", &in.q},
                                            {"k", &in.k},
                                            {"v", &in.v},
                                            {"head_map", &in.head_map},
                                            {"value_head_map", get(in.value_head_map)},
                                            {"alibi_slopes", get(in.alibi_slopes)},
                                            {"sinks", get(in.sinks)},
                                            {"attn_mask", get(in.attn_mask)},
                                            {"kv_lengths", get(in.kv_lengths)}}) {
    if (x) check_device(name, *x, in.q);
  }
  if (cache) {
    for (const auto& [name, x] : NamedTensors{{"page_table", get(cache->page_table)},
                                              {"kv_begin", get(cache->kv_begin)},
                                              {"q_offsets", get(cache->q_offsets)}}) {
      if (x) check_device(name, *x, in.q);
    }
  }
  const NamedTensors qkv = {{"q", &in.q}, {"k", &in.k}, {"v", &in.v}};
  for (const auto& [name, x] : qkv) check_last_dim_contiguous(name, *x);
  for (const auto& [name, x] : qkv) {
    STD_TORCH_CHECK(x->dim() == 4, name, " must have 4 dims, got ", x->dim());
    STD_TORCH_CHECK(x->size(3) >= 1 && x->size(3) <= kMaxHeadDim, name,
                    " must have a head dim of 1 to ", kMaxHeadDim, ", got ", x->size(3));
  }
  check_shapes(in, cache);
}

Outputs empty_outputs(const Inputs& in) {
  const int64_t batch = in.q.size(0), heads = in.q.size(1), tokens = in.q.size(2);
  const int64_t dim = in.v.size(3);
  using torch::stable::new_empty;
  Tensor out = in.bshd
                   ? torch::stable::transpose(new_empty(in.q, {batch, tokens, heads, dim}), 1, 2)
                   : new_empty(in.q, {batch, heads, tokens, dim});
  return {out, new_empty(in.q, {batch, heads, tokens}, ScalarType::Float)};
}

AttentionParams params_of(const Inputs& in, const CacheInputs* cache, Outputs& outputs) {
  AttentionParams params{};
  params.batch = in.q.size(0);
  params.num_heads = in.q.size(1);
  params.q_len = in.q.size(2);
  params.head_dim = in.q.size(3);
  params.num_k_heads = in.k.size(1);
  params.kv_len = in.k.size(2);
  params.num_v_heads = in.v.size(1);
  params.value_head_dim = in.v.size(3);

  params.q = in.q.const_data_ptr();
  params.k = in.k.const_data_ptr();
  params.v = in.v.const_data_ptr();
  params.out = outputs.out.mutable_data_ptr();
  params.lse = static_cast<float*>(outputs.lse.mutable_data_ptr());
  params.q_stride = strides_of(in.q);
  params.k_stride = strides_of(in.k);
  params.v_stride = strides_of(in.v);
  params.out_stride = strides_of(outputs.out);
  params.head_map = static_cast<const int32_t*>(in.head_map.const_data_ptr());
  params.value_head_map = data_of<int32_t>(in.value_head_map);
  params.sinks = data_of<float>(in.sinks);
  if (in.alibi_slopes) {
    params.alibi_slopes = data_of<float>(in.alibi_slopes);
    params.alibi_stride_b = in.alibi_slopes->stride(0);
    params.alibi_stride_h = in.alibi_slopes->stride(1);
  }
  if (in.attn_mask) {
    params.attn_mask = in.attn_mask->const_data_ptr();
    params.mask_dtype = dtype_of("attn_mask", *in.attn_mask);
    params.mask_stride_b = in.attn_mask->stride(0);
    params.mask_stride_h = in.attn_mask->stride(1);
    params.mask_stride_q = in.attn_mask->stride(2);
    params.mask_stride_k = in.attn_mask->stride(3);
  }
  if (in.kv_lengths) {
    params.kv_lengths = data_of<int32_t>(in.kv_lengths);
    params.kv_lengths_stride_b = in.kv_lengths->stride(0);
    params.kv_lengths_stride_h = in.kv_lengths->stride(1);
  }
  params.dtype = params.k_dtype = params.v_dtype = dtype_of("q", in.q);
  params.num_pages = in.k.size(0);
  params.page_size = in.k.size(2);
  params.max_pages = 1;
  if (cache) {
    params.batch = in.kv_lengths->size(0);
    if (cache->page_table) {
      params.page_table = data_of<int32_t>(cache->page_table);
      params.page_table_stride_b = cache->page_table->stride(0);
      params.page_table_stride_h = cache->page_table->stride(1);
      params.page_table_stride_p = cache->page_table->stride(2);
      params.max_pages = cache->page_table->size(2);
      params.kv_len = params.max_pages * params.page_size;
    }
    params.kv_begin = data_of<int32_t>(cache->kv_begin);
    if (cache->q_offsets) {
      params.q_offsets = data_of<int32_t>(cache->q_offsets);
      params.q_len = cache->max_q_len;
    }
  }
  // No window is wider than all tokens, and so no position overflows by adding one.
  const int64_t all_tokens = params.q_len + params.kv_len;
  params.window_left = in.window_left < all_tokens ? in.window_left : -1;
  params.window_right = in.window_right < all_tokens ? in.window_right : -1;
  params.scale = static_cast<float>(in.scale);
  params.softcap = static_cast<float>(in.softcap);
  return params;
}

}  // namespace gqa::host
