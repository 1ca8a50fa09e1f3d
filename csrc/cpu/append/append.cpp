// One row (token of one head) at a time: widen, rotate, round to the tokens' type, then store or
// quantise. Memory bandwidth limits it, so one version serves all instruction sets. Every backend
// stores the same bits.
#define GQA_ISA append

#include "append.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../../core/quantize.h"
#include "../forward/kv_rows.h"
#include "../isa/vec_portable.h"
#include "../limits.h"

namespace gqa::cpu {
namespace append {
namespace {

// Numbers below which waking another thread costs more than it saves (about 10 microseconds).
constexpr int64_t kMinNumbersPerWorker = 32 * 1024;

using append::to_float;

GQA_INLINE float to_float(float x) { return x; }
GQA_INLINE void store_number(float x, float* out) { *out = x; }
GQA_INLINE void store_number(float x, BFloat16* out) { *out = to_bfloat16(x); }
GQA_INLINE void store_number(float x, Float16* out) { *out = to_float16(x); }

template <class T>
void widen(const void* from, int64_t offset, int64_t n, float* to) {
  const T* row = static_cast<const T*>(from) + offset;
  for (int64_t i = 0; i < n; ++i) to[i] = to_float(row[i]);
}

void widen(DType dtype, const void* from, int64_t offset, int64_t n, float* to) {
  switch (dtype) {
    case DType::kBFloat16: return widen<BFloat16>(from, offset, n, to);
    case DType::kFloat16: return widen<Float16>(from, offset, n, to);
    default: return widen<float>(from, offset, n, to);
  }
}

// x[i] rounded to T and widened again.
template <class T>
void round_numbers(float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    T rounded;
    store_number(x[i], &rounded);
    x[i] = to_float(rounded);
  }
}

// RoFormer (arXiv 2104.09864), section 3.4.2, in fp32, then rounded to T.
template <class T>
void rotate(const AppendParams& params, int64_t position, float* x) {
  const int64_t half = params.rotary_dim / 2;
  const int64_t row = std::min(std::max<int64_t>(position, 0), params.rotary_positions - 1);
  float cos[kMaxHeadDim / 2], sin[kMaxHeadDim / 2];
  widen(params.cos_dtype, params.rotary_cos, row * params.cos_stride, half, cos);
  widen(params.sin_dtype, params.rotary_sin, row * params.sin_stride, half, sin);
  const int64_t step = params.rotary_interleaved ? 2 : 1;
  const int64_t partner = params.rotary_interleaved ? 1 : half;
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i * step], b = x[i * step + partner];
    x[i * step] = a * cos[i] - b * sin[i];
    x[i * step + partner] = b * cos[i] + a * sin[i];
  }
  round_numbers<T>(x, params.rotary_dim);
}

// K's or V's side of the cache.
struct Side {
  void* data;
  const Strides& stride;
  float *scale, *zero;
  const Strides &scale_stride, &zero_stride;
  bool dynamic;
  int64_t dims;
};

Side k_side(const AppendParams& p) {
  return {p.k,         p.cache.k_stride,       p.k_scale,
          p.k_zero,    p.cache.k_scale_stride, p.cache.k_zero_stride,
          p.k_dynamic, p.cache.head_dim};
}

Side v_side(const AppendParams& p) {
  return {p.v,         p.cache.v_stride,       p.v_scale,
          p.v_zero,    p.cache.v_scale_stride, p.cache.v_zero_stride,
          p.v_dynamic, p.cache.value_head_dim};
}

// The offset of a row in a [P, H, slots] tensor.
int64_t offset_of(const Strides& stride, int64_t page, int64_t head, int64_t slot) {
  return page * stride.b + head * stride.h + slot * stride.s;
}

// Quantises x[0] to x[dims - 1] to a row of S.
template <class S>
void quantize_row(const float* x, int64_t dims, const RowScale& scale, S* row) {
  uint8_t* bytes = reinterpret_cast<uint8_t*>(row);
  if constexpr (kNumbersPerElement<S> == 1) {
    for (int64_t i = 0; i < dims; ++i) bytes[i] = stored_bits<S>(quantize<S>(x[i], scale));
  } else {
    for (int64_t i = 0; i < dims; i += 2) {
      const int low = stored_bits<S>(quantize<S>(x[i], scale));
      bytes[i / 2] = static_cast<uint8_t>(low | stored_bits<S>(quantize<S>(x[i + 1], scale)) << 4);
    }
  }
}

// T: of the tokens. S: of the cache.
template <class T, class S>
void store(const Side& side, const float* x, int64_t page, int64_t head, int64_t slot) {
  S* row = static_cast<S*>(side.data) + offset_of(side.stride, page, head, slot);
  if constexpr (!kQuantized<S>) {
    for (int64_t i = 0; i < side.dims; ++i) store_number(x[i], row + i);
  } else {
    RowScale scale{1.0f, format_of<S>().default_zero};
    float* to_scale = nullptr;
    float* to_zero = nullptr;
    if (side.scale) to_scale = side.scale + offset_of(side.scale_stride, page, head, slot);
    if (side.zero) to_zero = side.zero + offset_of(side.zero_stride, page, head, slot);
    if (side.dynamic) {
      RowRange range;
      for (int64_t i = 0; i < side.dims; ++i) range.include(x[i]);
      scale = row_scale<S>(range, to_zero != nullptr);
      *to_scale = scale.scale;
      if (to_zero) *to_zero = scale.zero;
    } else {
      if (to_scale) scale.scale = *to_scale;
      if (to_zero) scale.zero = *to_zero;
    }
    quantize_row(x, side.dims, scale, row);
  }
}

// S, SV: types of K and V in the cache.
template <class T, class S, class SV>
class Append {
 public:
  explicit Append(const AppendParams& params) : params_(params), cache_(params.cache) {}

  // Appends new token number `token` to all heads.
  void run_token(int64_t token) const {
    int64_t b, i, stored_b = 0, stored_token = token;
    if (params_.new_offsets == nullptr) {
      b = stored_b = token / params_.num_tokens;
      i = stored_token = token % params_.num_tokens;
    } else {
      const int32_t* begin = params_.new_offsets;
      const int32_t* end = begin + cache_.batch + 1;
      b = std::upper_bound(begin, end, token) - begin - 1;
      i = b < cache_.batch ? token - begin[b] : 0;
    }
    const bool of_sequence = b < cache_.batch;  // otherwise only q is copied
    float x[kMaxHeadDim];
    if (params_.q != nullptr) {
      for (int64_t h = 0; h < cache_.num_heads; ++h) {
        widen<T>(params_.q, offset_of(params_.q_stride, stored_b, h, stored_token), cache_.head_dim,
                 x);
        if (of_sequence) rotate<T>(params_, length(b, 0) + i, x);
        T* to = static_cast<T*>(params_.q_rotated) +
                offset_of(params_.q_rotated_stride, stored_b, h, stored_token);
        for (int64_t d = 0; d < cache_.head_dim; ++d) store_number(x[d], to + d);
      }
    }
    if (!of_sequence) return;
    for (int64_t h = 0; h < cache_.num_k_heads; ++h) {
      widen<T>(params_.k_new, offset_of(params_.k_new_stride, stored_b, h, stored_token),
               cache_.head_dim, x);
      const int64_t position = length(b, h) + i;
      if (params_.rotary_cos != nullptr) rotate<T>(params_, position, x);
      store_at<S>(k_side(params_), x, b, h, h, position);
    }
    // If value heads differ from key heads, all share one table row and length.
    const bool paired = cache_.num_v_heads == cache_.num_k_heads;
    for (int64_t h = 0; h < cache_.num_v_heads; ++h) {
      widen<T>(params_.v_new, offset_of(params_.v_new_stride, stored_b, h, stored_token),
               cache_.value_head_dim, x);
      const int64_t k_head = paired ? h : 0;
      store_at<SV>(v_side(params_), x, b, k_head, h, length(b, k_head) + i);
    }
  }

 private:
  int64_t length(int64_t b, int64_t h) const {
    return cache_.kv_lengths[b * cache_.kv_lengths_stride_b + h * cache_.kv_lengths_stride_h];
  }

  template <class Stored>
  void store_at(const Side& side, const float* x, int64_t b, int64_t k_head, int64_t head,
                int64_t position) const {
    const int64_t begin = cache_.kv_begin == nullptr ? 0 : cache_.kv_begin[b];
    if (position < 0 || begin + position >= cache_.kv_len) return;
    const Pages pages(cache_, b, k_head);
    pages.walk(position, 1, [&](int64_t page, int64_t slot, int, int) {
      if (page >= 0) store<T, Stored>(side, x, page, head, slot);
    });
  }

  const AppendParams& params_;
  const AttentionParams& cache_;
};

template <class T, class S, class SV = S>
void run_tokens(const AppendParams& params, int64_t begin, int64_t end) {
  const Append<T, S, SV> append(params);
  for (int64_t token = begin; token < end; ++token) append.run_token(token);
}

using TokensFunction = void (*)(const AppendParams& params, int64_t begin, int64_t end);

template <class T>
TokensFunction tokens_function(DType k, DType v) {
  if (k == DType::kInt8 && v == DType::kInt4) return run_tokens<T, Int8, Int4Pair>;
  switch (k) {
    case DType::kFloat8E4M3: return run_tokens<T, Float8E4M3>;
    case DType::kFloat8E5M2: return run_tokens<T, Float8E5M2>;
    case DType::kInt8: return run_tokens<T, Int8>;
    case DType::kInt4: return run_tokens<T, Int4Pair>;
    default: return run_tokens<T, T>;
  }
}

TokensFunction tokens_function(DType tokens, DType k, DType v) {
  switch (tokens) {
    case DType::kBFloat16: return tokens_function<BFloat16>(k, v);
    case DType::kFloat16: return tokens_function<Float16>(k, v);
    default: return tokens_function<float>(k, v);
  }
}

// Every worker takes an equal share of the tokens.
struct Work {
  const AppendParams& params;
  TokensFunction run_tokens;
  int64_t tokens, workers;

  void run_worker(int64_t worker) const {
    run_tokens(params, tokens * worker / workers, tokens * (worker + 1) / workers);
  }
};

}  // namespace
}  // namespace append

void cache_append(const AppendParams& params, const ThreadPool& pool) {
  const AttentionParams& cache = params.cache;
  const int64_t tokens =
      params.new_offsets == nullptr ? params.num_tokens * cache.batch : params.num_tokens;
  const int64_t heads = cache.num_k_heads + cache.num_v_heads + (params.q ? cache.num_heads : 0);
  const int64_t wanted = tokens * heads * cache.head_dim / append::kMinNumbersPerWorker;
  const int64_t workers = std::min<int64_t>(pool.num_threads, std::max<int64_t>(wanted, 1));
  append::Work work{params, append::tokens_function(params.dtype, cache.k_dtype, cache.v_dtype),
                    tokens, workers};
  run_workers(pool, workers, work);
}

}  // namespace gqa::cpu
