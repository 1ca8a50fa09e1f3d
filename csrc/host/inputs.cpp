#include "inputs.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <tuple>
#include <utility>

#include "allocate.h"

namespace gqa::host {
namespace {

using NamedTensors = std::initializer_list<std::pair<const char*, const Tensor*>>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

const Tensor* get(const OptionalTensor& x) { return x ? &*x : nullptr; }

template <class T>
const T* data_of(const OptionalTensor& x) {
  return x ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

// Each function asks torch for a type or for sizes only once, because a query takes some
// nanoseconds.
DType dtype_of(const char* name, ScalarType type) {
  switch (type) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::Bool: return DType::kBool;
    default:
      STD_TORCH_CHECK(false, name, " must have dtype Float, BFloat16, Half or (a mask) Bool, got ",
                      torch::headeronly::toString(type));
  }
}

// The type of the numbers in a cache.
DType storage_dtype_of(const char* name, ScalarType type, ScalarType q_type) {
  switch (type) {
    case ScalarType::Float8_e4m3fn: return DType::kFloat8E4M3;
    case ScalarType::Float8_e5m2: return DType::kFloat8E5M2;
    case ScalarType::Char: return DType::kInt8;
    case ScalarType::Byte: return DType::kInt4;
    default:
      STD_TORCH_CHECK(type == q_type, name,
                      " must have q's dtype, or Float8_e4m3fn, Float8_e5m2, Char or Byte, got ",
                      torch::headeronly::toString(type));
      return dtype_of(name, type);
  }
}

void check_dtypes(const Inputs& in) {
  const ScalarType q_type = in.q.scalar_type(), k_type = in.k.scalar_type();
  const DType dtype = dtype_of("q", q_type);
  STD_TORCH_CHECK(dtype != DType::kBool, "q must be floating point, got Bool");
  const bool quantized = storage_dtype_of("k", k_type, q_type) != dtype;
  const ScalarType v_type = in.v.scalar_type();
  STD_TORCH_CHECK(v_type == k_type || (k_type == ScalarType::Char && v_type == ScalarType::Byte),
                  "v must have dtype ", torch::headeronly::toString(k_type),
                  ", or Byte where k has Char, got ", torch::headeronly::toString(v_type));
  check_dtype("head_map", in.head_map, ScalarType::Int);
  for (const auto& [name, x] : NamedTensors{{"value_head_map", get(in.value_head_map)},
                                            {"kv_lengths", get(in.kv_lengths)},
                                            {"page_table", get(in.page_table)},
                                            {"kv_begin", get(in.kv_begin)},
                                            {"q_offsets", get(in.q_offsets)},
                                            {"key_ranges", get(in.key_ranges)}}) {
    if (x) check_dtype(name, *x, ScalarType::Int);
  }
  for (const auto& [name, x] :
       NamedTensors{{"alibi_slopes", get(in.alibi_slopes)}, {"sinks", get(in.sinks)}}) {
    if (x) check_dtype(name, *x, ScalarType::Float);
  }
  if (in.attn_mask) {
    const DType mask = dtype_of("attn_mask", in.attn_mask->scalar_type());
    STD_TORCH_CHECK(mask == DType::kBool || mask == DType::kFloat32 || mask == dtype,
                    "attn_mask must have dtype Bool, Float or q's, got ",
                    torch::headeronly::toString(in.attn_mask->scalar_type()));
  }
  if (in.dropout_seed) check_dtype("dropout_seed", *in.dropout_seed, ScalarType::Long);
  STD_TORCH_CHECK(!quantized || (in.k_scale && in.v_scale),
                  "k_scale and v_scale must be given where k does not have q's dtype");
  for (const auto& [name, x] : NamedTensors{{"k_scale", get(in.k_scale)},
                                            {"v_scale", get(in.v_scale)},
                                            {"k_zero", get(in.k_zero)},
                                            {"v_zero", get(in.v_zero)}}) {
    if (!x) continue;
    STD_TORCH_CHECK(quantized, name, " must be None where k has q's dtype");
    check_dtype(name, *x, ScalarType::Float);
  }
}

// Whether sequences are packed: then all of them read the same row of k and v.
bool shares_storage(const Inputs& in) { return in.kv_begin && !in.page_table && in.k.size(0) == 1; }

// Checks the shapes of the storage, page table and lengths. Returns the slots of a sequence.
int64_t check_storage_shapes(const Inputs& in, int64_t batch, Sizes k, Sizes v) {
  const int64_t pages = k[0], heads = k[1], page_size = k[2];
  int64_t max_pages = 1;
  if (in.page_table) {
    STD_TORCH_CHECK(in.page_table->dim() == 3,
                    "page_table must have 3 dims, [B, Hk, max_pages], got ", in.page_table->dim());
    max_pages = in.page_table->size(2);
    check_shape("page_table", *in.page_table, {batch, heads, max_pages});
  } else {
    STD_TORCH_CHECK(pages == batch || shares_storage(in), "k must have a page for each of ", batch,
                    " sequences where there is no page_table, got ", pages);
  }
  STD_TORCH_CHECK(in.kv_lengths || !(in.page_table || in.kv_begin || in.q_offsets),
                  "kv_lengths must be given with page_table, kv_begin and q_offsets");
  check_shape("v", in.v, {pages, v[1], page_size, v[3]});
  for (const auto& [name, x] :
       NamedTensors{{"k_scale", get(in.k_scale)}, {"k_zero", get(in.k_zero)}}) {
    if (x) check_shape(name, *x, {pages, heads, page_size});
  }
  for (const auto& [name, x] :
       NamedTensors{{"v_scale", get(in.v_scale)}, {"v_zero", get(in.v_zero)}}) {
    if (x) check_shape(name, *x, {pages, v[1], page_size});
  }
  if (in.kv_lengths) check_shape("kv_lengths", *in.kv_lengths, {batch, heads});
  if (in.kv_begin) check_shape("kv_begin", *in.kv_begin, {batch});
  if (in.q_offsets) check_shape("q_offsets", *in.q_offsets, {batch + 1});
  return max_pages * page_size;
}

int64_t batch_of(const Inputs& in, Sizes q) {
  return in.kv_lengths ? in.kv_lengths->size(0) : q[0];
}

// Checks and returns the sizes of q, k or v, whose elements hold one or two numbers.
void check_head_dim(const char* name, Sizes sizes, int64_t numbers, int64_t max_head_dim) {
  STD_TORCH_CHECK(sizes.size() == 4, name, " must have 4 dims, got ", sizes.size());
  const int64_t dim = sizes[3] * numbers;
  STD_TORCH_CHECK(dim >= 1 && dim <= max_head_dim, name, " must have a head dim of 1 to ",
                  max_head_dim, ", got ", dim);
}

void check_shapes(const Inputs& in, int64_t max_head_dim) {
  const Sizes q = in.q.sizes(), k = in.k.sizes(), v = in.v.sizes();
  const auto per_element = [](const Tensor& x) {
    return x.scalar_type() == ScalarType::Byte ? 2 : 1;
  };
  check_head_dim("q", q, 1, max_head_dim);
  check_head_dim("k", k, per_element(in.k), max_head_dim);
  check_head_dim("v", v, per_element(in.v), max_head_dim);
  STD_TORCH_CHECK(!in.kv_lengths || in.kv_lengths->dim() == 2,
                  "kv_lengths must have 2 dims, [B, Hk], got ", in.kv_lengths->dim());
  const int64_t batch = batch_of(in, q), heads = q[1], tokens = q[2];
  check_shape("q", in.q, {in.q_offsets ? 1 : batch, heads, tokens, k[3] * per_element(in.k)});
  const int64_t kv_len = check_storage_shapes(in, batch, k, v);
  check_shape("head_map", in.head_map, {heads});
  if (in.value_head_map) check_shape("value_head_map", *in.value_head_map, {heads});
  if (in.alibi_slopes) check_shape("alibi_slopes", *in.alibi_slopes, {batch, heads});
  if (in.sinks) check_shape("sinks", *in.sinks, {heads});
  if (in.attn_mask) {
    check_shape("attn_mask", *in.attn_mask,
                {batch, heads, in.q_offsets ? in.max_q_len : tokens,
                 in.q_offsets && shares_storage(in) ? in.max_kv_len : kv_len});
  }
  if (in.key_ranges) {
    check_shape("key_ranges", *in.key_ranges,
                {batch, heads, in.q_offsets ? in.max_q_len : tokens, 2});
  }
  STD_TORCH_CHECK(in.dropout_p >= 0 && in.dropout_p < 1, "dropout_p must lie in [0, 1), got ",
                  in.dropout_p);
  STD_TORCH_CHECK(in.dropout_p == 0 || in.dropout_seed,
                  "dropout_seed must be given with dropout_p > 0");
  STD_TORCH_CHECK(in.dropout_p == 0 || !in.page_table, "dropout_p must be 0 with page_table, got ",
                  in.dropout_p);
  if (in.dropout_seed) check_shape("dropout_seed", *in.dropout_seed, {2});
}

void set_row_values(const OptionalTensor& x, const float*& data, Strides& strides) {
  if (!x) return;
  data = data_of<float>(x);
  strides = strides_of(*x);
}

// Enters the addresses of keys and values, after the shapes of q, k and v.
void set_storage(AttentionParams& params, const Inputs& in, Sizes q, Sizes k) {
  params.batch = batch_of(in, q);
  if (params.v_dtype == DType::kInt4) params.value_head_dim *= 2;
  params.page_size = k[2];
  params.num_pages = k[0];
  params.max_pages = 1;
  if (shares_storage(in)) {
    params.num_pages = params.batch;
    params.k_stride.b = params.v_stride.b = 0;
  }
  if (in.page_table) {
    params.page_table = data_of<int32_t>(in.page_table);
    params.page_table_stride_b = in.page_table->stride(0);
    params.page_table_stride_h = in.page_table->stride(1);
    params.page_table_stride_p = in.page_table->stride(2);
    params.max_pages = in.page_table->size(2);
  }
  params.kv_len = params.max_pages * params.page_size;
  params.kv_begin = data_of<int32_t>(in.kv_begin);
  if (in.q_offsets) {
    params.q_offsets = data_of<int32_t>(in.q_offsets);
    params.q_len = in.max_q_len;
  }
  set_row_values(in.k_scale, params.k_scale, params.k_scale_stride);
  set_row_values(in.v_scale, params.v_scale, params.v_scale_stride);
  set_row_values(in.k_zero, params.k_zero, params.k_zero_stride);
  set_row_values(in.v_zero, params.v_zero, params.v_zero_stride);
}

}  // namespace

Strides strides_of(const Tensor& x) {
  const auto strides = x.strides();
  return {strides[0], strides[1], strides[2]};
}

Tensor empty_beside(const Tensor& x, ScalarType dtype, std::initializer_list<int64_t> sizes,
                    std::initializer_list<int64_t> strides) {
  int32_t device;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device));
  return or_say_what("the output of attention", sizes.begin(), sizes.size(), dtype, [&] {
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        static_cast<int64_t>(sizes.size()), sizes.begin(), strides.begin(),
        torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device,
        x.get_device_index(), &handle));
    return Tensor(handle);
  });
}

void check_inputs(const Inputs& in, int64_t max_head_dim,
                  void (*check_device)(const char* name, const Tensor& x, const Tensor& q)) {
  check_dtypes(in);
  for (const auto& [name, x] : NamedTensors{{"q", &in.q},
                                            {"k", &in.k},
                                            {"v", &in.v},
                                            {"head_map", &in.head_map},
                                            {"value_head_map", get(in.value_head_map)},
                                            {"alibi_slopes", get(in.alibi_slopes)},
                                            {"sinks", get(in.sinks)},
                                            {"attn_mask", get(in.attn_mask)},
                                            {"kv_lengths", get(in.kv_lengths)},
                                            {"page_table", get(in.page_table)},
                                            {"kv_begin", get(in.kv_begin)},
                                            {"q_offsets", get(in.q_offsets)},
                                            {"k_scale", get(in.k_scale)},
                                            {"v_scale", get(in.v_scale)},
                                            {"k_zero", get(in.k_zero)},
                                            {"v_zero", get(in.v_zero)},
                                            {"dropout_seed", get(in.dropout_seed)},
                                            {"key_ranges", get(in.key_ranges)}}) {
    if (x) check_device(name, *x, in.q);
  }
  check_last_dim_contiguous("q", in.q);
  check_last_dim_contiguous("k", in.k);
  check_last_dim_contiguous("v", in.v);
  if (in.key_ranges) check_last_dim_contiguous("key_ranges", *in.key_ranges);
  check_shapes(in, max_head_dim);
}

AttentionParams params_of(const Inputs& in) {
  AttentionParams params{};
  const Sizes q = in.q.sizes(), k = in.k.sizes(), v = in.v.sizes();
  const ScalarType q_type = in.q.scalar_type();
  params.num_heads = q[1];
  params.q_len = params.q_tokens = q[2];
  params.head_dim = q[3];
  params.num_k_heads = k[1];
  params.num_v_heads = v[1];
  params.value_head_dim = v[3];
  params.dtype = dtype_of("q", q_type);
  params.k_dtype = storage_dtype_of("k", in.k.scalar_type(), q_type);
  params.v_dtype = storage_dtype_of("v", in.v.scalar_type(), q_type);
  params.k_stride = strides_of(in.k);
  params.v_stride = strides_of(in.v);
  set_storage(params, in, q, k);

  params.q = in.q.const_data_ptr();
  params.k = in.k.const_data_ptr();
  params.v = in.v.const_data_ptr();
  params.q_stride = strides_of(in.q);
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
    params.mask_dtype = dtype_of("attn_mask", in.attn_mask->scalar_type());
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
  // A window wider than all tokens is cut to that, so that adding it to a position can't overflow.
  const int64_t all_tokens = params.q_len + params.kv_len;
  params.window_left = in.window_left < all_tokens ? in.window_left : -1;
  params.window_right = in.window_right < all_tokens ? in.window_right : -1;
  params.scale = static_cast<float>(in.scale ? *in.scale : std::pow(params.head_dim, -0.5));
  params.softcap = static_cast<float>(in.softcap);
  if (in.dropout_p > 0) {
    params.dropout_threshold = static_cast<uint32_t>(std::floor(in.dropout_p * 0x1p32));
    params.dropout_scale = static_cast<float>(1 / (1 - in.dropout_p));
    params.dropout_seed = data_of<int64_t>(in.dropout_seed);
  }
  return params;
}

Tensor add_output(AttentionParams& params, const Tensor& q, bool bshd) {
  const int64_t batch = q.size(0), heads = q.size(1), tokens = q.size(2);
  const int64_t dim = params.value_head_dim;
  const auto make = [&](const std::vector<int64_t>& sizes) {
    return new_result("the output of attention", q, sizes, q.scalar_type());
  };
  Tensor out = bshd ? torch::stable::transpose(make({batch, tokens, heads, dim}), 1, 2)
                    : make({batch, heads, tokens, dim});
  params.out = out.mutable_data_ptr();
  params.out_stride = strides_of(out);
  return out;
}

Tensor add_unfilled_output(AttentionParams& params, const Tensor& q, bool bshd) {
  const int64_t heads = params.num_heads, tokens = params.q_tokens, dim = params.value_head_dim;
  const int64_t rows = std::max<int64_t>(tokens, 1);  // torch's strides of an empty tensor
  const Strides strides{heads * rows * dim, bshd ? dim : rows * dim, bshd ? heads * dim : dim};
  Tensor out = empty_beside(q, q.scalar_type(), {q.size(0), heads, tokens, dim},
                            {strides.b, strides.h, strides.s, 1});
  params.out = out.mutable_data_ptr();
  params.out_stride = strides;
  return out;
}

Tensor add_lse(AttentionParams& params, const Tensor& q) {
  Tensor lse =
      new_result("the LSE of attention", q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  params.lse = static_cast<float*>(lse.mutable_data_ptr());
  return lse;
}

}  // namespace gqa::host
