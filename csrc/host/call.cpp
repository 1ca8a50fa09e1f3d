#include "call.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>
#include <utility>

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

// Type of the numbers in a cache's storage.
DType storage_dtype_of(const char* name, const Tensor& x, const Tensor& q) {
  switch (x.scalar_type()) {
    case ScalarType::Float8_e4m3fn: return DType::kFloat8E4M3;
    case ScalarType::Float8_e5m2: return DType::kFloat8E5M2;
    case ScalarType::Char: return DType::kInt8;
    case ScalarType::Byte: return DType::kInt4;
    default:
      STD_TORCH_CHECK(x.scalar_type() == q.scalar_type(), name,
                      " must have q's dtype, or Float8_e4m3fn, Float8_e5m2, Char or Byte, got ",
                      torch::headeronly::toString(x.scalar_type()));
      return dtype_of(name, x);
  }
}

// The elements of a small 1-D tensor, whatever its stride.
template <class T>
std::vector<T> elements_of(const Tensor& x) {
  const T* data = static_cast<const T*>(x.const_data_ptr());
  std::vector<T> elements(x.numel());
  for (size_t i = 0; i < elements.size(); ++i)
    elements[i] = data[static_cast<int64_t>(i) * x.stride(0)];
  return elements;
}

using NamedTensor = std::pair<const char*, const OptionalTensor*>;

std::array<NamedTensor, 3> tables(const CacheArguments& cache) {
  return {NamedTensor{"page_table", &cache.page_table},
          {"kv_begin", &cache.kv_begin},
          {"q_offsets", &cache.q_offsets}};
}

std::array<NamedTensor, 4> row_values(const CacheArguments& cache) {
  return {NamedTensor{"k_scale", &cache.k_scale},
          {"v_scale", &cache.v_scale},
          {"k_zero", &cache.k_zero},
          {"v_zero", &cache.v_zero}};
}

void check_cache_dtypes(const CallArguments& x) {
  const DType stored = storage_dtype_of("k", x.k, x.q);
  check_dtype("v", x.v, x.k.scalar_type());
  for (const auto& [name, tensor] : tables(*x.cache)) {
    if (*tensor) check_dtype(name, **tensor, ScalarType::Int);
    if (*tensor) check_cpu(name, **tensor);
  }
  for (const auto& [name, tensor] : row_values(*x.cache)) {
    if (!*tensor) continue;
    STD_TORCH_CHECK(stored != dtype_of("q", x.q), name, " must be None where k has q's dtype");
    check_dtype(name, **tensor, ScalarType::Float);
    check_cpu(name, **tensor);
  }
}

// Shapes and values of what a cache adds; returns (sequences, slots of a sequence).
std::pair<int64_t, int64_t> check_cache_shapes(const CallArguments& x) {
  const CacheArguments& cache = *x.cache;
  const int64_t pages = x.k.size(0), page_size = x.k.size(2);
  STD_TORCH_CHECK(x.kv_lengths && x.kv_lengths->dim() == 2, "kv_lengths must have 2 dims");
  const int64_t batch = x.kv_lengths->size(0);
  int64_t max_pages = 1;
  if (cache.page_table) {
    STD_TORCH_CHECK(cache.page_table->dim() == 3, "page_table must have 3 dims, got ",
                    cache.page_table->dim());
    max_pages = cache.page_table->size(2);
    check_shape("page_table", *cache.page_table, {batch, x.k.size(1), max_pages});
  } else {
    STD_TORCH_CHECK(pages >= batch, "k must have a page for each of ", batch,
                    " sequences where there is no page_table, got ", pages);
  }
  for (const auto& [name, tensor] : row_values(cache)) {
    const int64_t heads = name[0] == 'k' ? x.k.size(1) : x.v.size(1);
    if (*tensor) check_shape(name, **tensor, {pages, heads, page_size});
  }
  if (cache.kv_begin) {
    check_shape("kv_begin", *cache.kv_begin, {batch});
    for (const int32_t begin : elements_of<int32_t>(*cache.kv_begin)) {
      STD_TORCH_CHECK(begin >= 0 && begin <= max_pages * page_size, "kv_begin must lie in [0, ",
                      max_pages * page_size, "], got ", begin);
    }
  }
  if (cache.q_offsets) {
    check_shape("q_offsets", *cache.q_offsets, {batch + 1});
    int32_t last = 0;
    for (const int32_t offset : elements_of<int32_t>(*cache.q_offsets)) {
      STD_TORCH_CHECK(offset >= last && offset <= x.q.size(2),
                      "q_offsets must ascend from 0 to at most q's tokens (", x.q.size(2),
                      "), got ", offset, " after ", last);
      last = offset;
    }
  }
  return {batch, max_pages * page_size};
}

void check_inputs(const CallArguments& x) {
  const auto& [q, k, v, head_map, value_head_map, alibi_slopes, sinks, attn_mask, kv_lengths, scale,
               window_left, window_right, softcap, dropout_p, dropout_seed, cache] = x;
  STD_TORCH_CHECK(dtype_of("q", q) != DType::kBool, "q must be floating point, got Bool");
  if (cache == nullptr) {
    check_dtype("k", k, q.scalar_type());
    check_dtype("v", v, q.scalar_type());
  } else {
    check_cache_dtypes(x);
  }
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

  const int64_t packed = k.scalar_type() == ScalarType::Byte ? 2 : 1;  // numbers in an element
  for (const auto& [name, x] : {std::pair{"q", &q}, {"k", &k}, {"v", &v}}) {
    STD_TORCH_CHECK(x->dim() == 4, name, " must have 4 dims, got ", x->dim());
    const int64_t dim = x->size(3) * (x == &q ? 1 : packed);
    STD_TORCH_CHECK(dim >= 1 && dim <= kMaxHeadDim, name, " must have a head dim of 1 to ",
                    kMaxHeadDim, ", got ", dim);
  }
  const int64_t heads = q.size(1), q_len = q.size(2);
  int64_t batch = q.size(0), kv_len = k.size(2);
  if (cache == nullptr) {
    check_shape("k", k, {batch, k.size(1), kv_len, q.size(3)});
  } else {
    std::tie(batch, kv_len) = check_cache_shapes(x);
    check_shape("q", q, {cache->q_offsets ? 1 : batch, heads, q_len, k.size(3) * packed});
    STD_TORCH_CHECK(!cache->q_offsets || !attn_mask, "attn_mask must be None with q_offsets");
  }
  check_shape("v", v, {k.size(0), v.size(1), k.size(2), v.size(3)});
  check_shape("head_map", head_map, {heads});
  if (value_head_map) check_shape("value_head_map", *value_head_map, {heads});
  if (alibi_slopes) check_shape("alibi_slopes", *alibi_slopes, {batch, heads});
  if (sinks) check_shape("sinks", *sinks, {heads});
  if (attn_mask) check_shape("attn_mask", *attn_mask, {batch, heads, q_len, kv_len});
  if (kv_lengths) check_shape("kv_lengths", *kv_lengths, {batch, k.size(1)});
  STD_TORCH_CHECK(dropout_p >= 0 && dropout_p < 1, "dropout_p must lie in [0, 1), got ", dropout_p);
  STD_TORCH_CHECK(dropout_p == 0 || dropout_seed, "dropout_seed must be given with dropout_p > 0");
  if (dropout_seed) {
    check_dtype("dropout_seed", *dropout_seed, ScalarType::Long);
    check_cpu("dropout_seed", *dropout_seed);
    check_shape("dropout_seed", *dropout_seed, {2});
  }
}

}  // namespace

Strides strides_of(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

cpu::ThreadPool torch_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int64_t n, void (*body)(void*, int64_t), void* context) {
            torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body(context, i);
            });
          }};
}

Call::Call(const CallArguments& arguments) {
  check_inputs(arguments);
  const auto& [q, k, v, head_map, value_head_map, alibi_slopes, sinks, attn_mask, kv_lengths, scale,
               window_left, window_right, softcap, dropout_p, dropout_seed, cache] = arguments;
  params.batch = q.size(0);
  params.num_heads = q.size(1);
  params.q_len = params.q_tokens = q.size(2);
  params.head_dim = q.size(3);
  params.num_k_heads = k.size(1);
  params.kv_len = k.size(2);
  params.num_v_heads = v.size(1);
  params.value_head_dim = v.size(3);
  params.dtype = params.k_dtype = params.v_dtype = dtype_of("q", q);
  params.num_pages = k.size(0);
  params.page_size = k.size(2);
  params.max_pages = 1;
  if (cache != nullptr) set_cache(arguments);

  params.q = q.const_data_ptr();
  params.k = k.const_data_ptr();
  params.v = v.const_data_ptr();
  params.q_stride = strides_of(q);
  params.k_stride = strides_of(k);
  params.v_stride = strides_of(v);
  key_map_ = elements_of<int32_t>(head_map);
  params.head_map = key_map_.data();
  if (value_head_map) {
    value_map_ = elements_of<int32_t>(*value_head_map);
    params.value_head_map = value_map_.data();
  }
  if (sinks) {
    sink_logits_ = elements_of<float>(*sinks);
    params.sinks = sink_logits_.data();
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
  if (dropout_p > 0) {
    const std::vector<int64_t> seed = elements_of<int64_t>(*dropout_seed);
    params.dropout_threshold = static_cast<uint32_t>(std::floor(dropout_p * 0x1p32));
    params.dropout_scale = static_cast<float>(1 / (1 - dropout_p));
    params.dropout_seed = static_cast<uint64_t>(seed[0]);
    params.dropout_offset = static_cast<uint32_t>(seed[1]);
  }
}

// After the shapes of q, k and v.
void Call::set_cache(const CallArguments& arguments) {
  const CacheArguments& cache = *arguments.cache;
  params.batch = arguments.kv_lengths->size(0);
  params.k_dtype = params.v_dtype = storage_dtype_of("k", arguments.k, arguments.q);
  if (params.v_dtype == DType::kInt4) params.value_head_dim *= 2;
  if (cache.page_table) {
    params.page_table = static_cast<const int32_t*>(cache.page_table->const_data_ptr());
    params.page_table_stride_b = cache.page_table->stride(0);
    params.page_table_stride_h = cache.page_table->stride(1);
    params.page_table_stride_p = cache.page_table->stride(2);
    params.max_pages = cache.page_table->size(2);
  }
  params.kv_len = params.max_pages * params.page_size;
  if (cache.kv_begin) {
    kv_begin_ = elements_of<int32_t>(*cache.kv_begin);
    params.kv_begin = kv_begin_.data();
  }
  if (cache.q_offsets) {
    q_offsets_ = elements_of<int32_t>(*cache.q_offsets);
    params.q_offsets = q_offsets_.data();
    params.q_len = 0;
    for (int64_t b = 0; b < params.batch; ++b) {
      params.q_len = std::max<int64_t>(params.q_len, q_offsets_[b + 1] - q_offsets_[b]);
    }
  }
  const auto set_row_values = [](const OptionalTensor& x, const float*& data, Strides& strides) {
    if (!x) return;
    data = static_cast<const float*>(x->const_data_ptr());
    strides = strides_of(*x);
  };
  set_row_values(cache.k_scale, params.k_scale, params.k_scale_stride);
  set_row_values(cache.v_scale, params.v_scale, params.v_scale_stride);
  set_row_values(cache.k_zero, params.k_zero, params.k_zero_stride);
  set_row_values(cache.v_zero, params.v_zero, params.v_zero_stride);
}

}  // namespace gqa::host
