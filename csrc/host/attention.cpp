#include "attention.h"

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "../core/params.h"
#include "../cpu/attention.h"
#include "checks.h"

namespace gqa::host {
namespace {

constexpr int64_t kMaxHeadDim = 256;  // tiles of wider heads would not fit the caches

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

Strides strides_of(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

// The elements of a small 1-D tensor, whatever its stride.
template <class T>
std::vector<T> elements_of(const Tensor& x) {
  const T* data = static_cast<const T*>(x.const_data_ptr());
  std::vector<T> elements(x.numel());
  for (size_t i = 0; i < elements.size(); ++i)
    elements[i] = data[static_cast<int64_t>(i) * x.stride(0)];
  return elements;
}

cpu::ThreadPool torch_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int64_t n, void (*body)(void*, int64_t), void* context) {
            torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body(context, i);
            });
          }};
}

void check_inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& head_map,
                  const OptionalTensor& value_head_map, const OptionalTensor& alibi_slopes,
                  const OptionalTensor& sinks, const OptionalTensor& attn_mask,
                  const OptionalTensor& kv_lengths) {
  STD_TORCH_CHECK(dtype_of("q", q) != DType::kBool, "q must be floating point, got Bool");
  check_dtype("k", k, q.scalar_type());
  check_dtype("v", v, q.scalar_type());
  check_dtype("head_map", head_map, ScalarType::Int);
  if (value_head_map) check_dtype("value_head_map", *value_head_map, ScalarType::Int);
  if (alibi_slopes) check_dtype("alibi_slopes", *alibi_slopes, ScalarType::Float);
  if (sinks) check_dtype("sinks", *sinks, ScalarType::Float);
  if (attn_mask) {
    const DType mask = dtype_of("attn_mask", *attn_mask);
    STD_TORCH_CHECK(mask == DType::kBool || mask == DType::kFloat32 || mask == dtype_of("q", q),
                    "attn_mask must have dtype Bool, Float or q's, got ",
                    torch::headeronly::toString(attn_mask->scalar_type()));
  }
  if (kv_lengths) check_dtype("kv_lengths", *kv_lengths, ScalarType::Int);

  check_cpu("q", q);
  check_cpu("k", k);
  check_cpu("v", v);
  check_cpu("head_map", head_map);
  if (value_head_map) check_cpu("value_head_map", *value_head_map);
  if (alibi_slopes) check_cpu("alibi_slopes", *alibi_slopes);
  if (sinks) check_cpu("sinks", *sinks);
  if (attn_mask) check_cpu("attn_mask", *attn_mask);
  if (kv_lengths) check_cpu("kv_lengths", *kv_lengths);

  check_last_dim_contiguous("q", q);
  check_last_dim_contiguous("k", k);
  check_last_dim_contiguous("v", v);

  for (const auto& [name, x] : {std::pair{"q", &q}, {"k", &k}, {"v", &v}}) {
    STD_TORCH_CHECK(x->dim() == 4, name, " must have 4 dims, got ", x->dim());
    STD_TORCH_CHECK(x->size(3) >= 1 && x->size(3) <= kMaxHeadDim, name,
                    " must have a head dim of 1 to ", kMaxHeadDim, ", got ", x->size(3));
  }
  const int64_t batch = q.size(0), heads = q.size(1), q_len = q.size(2), kv_len = k.size(2);
  check_shape("k", k, {batch, k.size(1), kv_len, q.size(3)});
  check_shape("v", v, {batch, v.size(1), kv_len, v.size(3)});
  check_shape("head_map", head_map, {heads});
  if (value_head_map) check_shape("value_head_map", *value_head_map, {heads});
  if (alibi_slopes) check_shape("alibi_slopes", *alibi_slopes, {batch, heads});
  if (sinks) check_shape("sinks", *sinks, {heads});
  if (attn_mask) check_shape("attn_mask", *attn_mask, {batch, heads, q_len, kv_len});
  if (kv_lengths) check_shape("kv_lengths", *kv_lengths, {batch, k.size(1)});
}

}  // namespace

std::tuple<Tensor, Tensor> attention_forward_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& head_map,
    const OptionalTensor& value_head_map, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, const OptionalTensor& attn_mask, const OptionalTensor& kv_lengths,
    double scale, int64_t window_left, int64_t window_right, double softcap, bool bshd) {
  check_inputs(q, k, v, head_map, value_head_map, alibi_slopes, sinks, attn_mask, kv_lengths);

  AttentionParams params{};
  params.batch = q.size(0);
  params.num_heads = q.size(1);
  params.q_len = q.size(2);
  params.head_dim = q.size(3);
  params.num_k_heads = k.size(1);
  params.kv_len = k.size(2);
  params.num_v_heads = v.size(1);
  params.value_head_dim = v.size(3);

  Tensor out = bshd ? torch::stable::transpose(
                          torch::stable::new_empty(q, {params.batch, params.q_len, params.num_heads,
                                                       params.value_head_dim}),
                          1, 2)
                    : torch::stable::new_empty(
                          q, {params.batch, params.num_heads, params.q_len, params.value_head_dim});
  Tensor lse = torch::stable::new_empty(q, {params.batch, params.num_heads, params.q_len},
                                        ScalarType::Float);

  params.q = q.const_data_ptr();
  params.k = k.const_data_ptr();
  params.v = v.const_data_ptr();
  params.out = out.mutable_data_ptr();
  params.lse = static_cast<float*>(lse.mutable_data_ptr());
  params.q_stride = strides_of(q);
  params.k_stride = strides_of(k);
  params.v_stride = strides_of(v);
  params.out_stride = strides_of(out);
  const std::vector<int32_t> key_map = elements_of<int32_t>(head_map);
  std::vector<int32_t> value_map;
  std::vector<float> sink_logits;
  params.head_map = key_map.data();
  if (value_head_map) {
    value_map = elements_of<int32_t>(*value_head_map);
    params.value_head_map = value_map.data();
  }
  if (sinks) {
    sink_logits = elements_of<float>(*sinks);
    params.sinks = sink_logits.data();
  }
  if (alibi_slopes) {
    params.alibi_slopes = static_cast<const float*>(alibi_slopes->const_data_ptr());
    params.alibi_stride_b = alibi_slopes->stride(0);
    params.alibi_stride_h = alibi_slopes->stride(1);
  }
  if (attn_mask) {
    params.attn_mask = attn_mask->const_data_ptr();
    params.mask_dtype = dtype_of("attn_mask", *attn_mask);
    params.mask_stride_b = attn_mask->stride(0);
    params.mask_stride_h = attn_mask->stride(1);
    params.mask_stride_q = attn_mask->stride(2);
    params.mask_stride_k = attn_mask->stride(3);
  }
  if (kv_lengths) {
    params.kv_lengths = static_cast<const int32_t*>(kv_lengths->const_data_ptr());
    params.kv_lengths_stride_b = kv_lengths->stride(0);
    params.kv_lengths_stride_h = kv_lengths->stride(1);
  }
  // No window is wider than all tokens, and so no position overflows by adding one.
  const int64_t all_tokens = params.q_len + params.kv_len;
  params.window_left = window_left < all_tokens ? window_left : -1;
  params.window_right = window_right < all_tokens ? window_right : -1;
  params.scale = static_cast<float>(scale);
  params.softcap = static_cast<float>(softcap);
  params.dtype = dtype_of("q", q);
  params.k_dtype = params.v_dtype = params.dtype;
  params.num_pages = params.batch;
  params.page_size = params.kv_len;
  params.max_pages = 1;

  cpu::attention_forward(params, torch_threads());
  return {out, lse};
}

}  // namespace gqa::host
