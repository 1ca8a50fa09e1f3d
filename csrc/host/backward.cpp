#include "backward.h"

#include <algorithm>
#include <vector>

#include "../cpu/backward/backward.h"
#include "call.h"

namespace gqa::host {
namespace {

int64_t size_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kBool ? 1 : 2;
}

// The data of a [B, H, S, D] tensor from token `first` on.
template <class T>
T* from_token(T* data, int64_t first, const Strides& stride, DType dtype) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<Byte*>(data) + first * stride.s * size_of(dtype);
}

// Rows [first, first + count) of each head of contiguous [heads, tokens] numbers, into `rows`.
const float* copy_rows(const float* x, int64_t heads, int64_t tokens, int64_t first, int64_t count,
                       std::vector<float>& rows) {
  rows.resize(heads * count);
  for (int64_t h = 0; h < heads; ++h)
    std::copy_n(x + h * tokens + first, count, rows.data() + h * count);
  return rows.data();
}

// Computes gradients of packed sequences. Each sequence is a dense call that uses all threads.
void backward_of_sequences(const BackwardParams& all, const cpu::ThreadPool& pool,
                           bool batch_invariant, const cpu::KeyRanges& ranges) {
  const AttentionParams& call = all.call;
  const int64_t heads = call.num_heads;
  std::vector<float> lse, dlse, dsinks(heads);
  if (all.dslopes) std::fill_n(all.dslopes, call.batch * heads, 0.0f);
  if (all.dsinks) std::fill_n(all.dsinks, heads, 0.0f);
  for (int64_t b = 0; b < call.batch; ++b) {
    const int64_t first = call.q_offsets[b], rows = call.q_offsets[b + 1] - first;
    const int64_t begin = call.kv_begin[b];
    const int64_t keys =
        std::clamp<int64_t>(call.kv_lengths[b * call.kv_lengths_stride_b], 0, call.kv_len - begin);
    if (rows == 0 || keys == 0) continue;
    BackwardParams one = all;
    one.call.batch = one.call.num_pages = 1;
    one.call.q_len = one.call.q_tokens = rows;
    one.call.kv_len = one.call.page_size = one.max_kv_len = keys;
    one.call.q_offsets = one.call.kv_begin = one.call.kv_lengths = nullptr;
    one.call.q = from_token(call.q, first, call.q_stride, call.dtype);
    one.call.k = from_token(call.k, begin, call.k_stride, call.dtype);
    one.call.v = from_token(call.v, begin, call.v_stride, call.dtype);
    one.call.out = from_token(call.out, first, call.out_stride, call.dtype);
    copy_rows(call.lse, heads, call.q_tokens, first, rows, lse);
    one.call.lse = lse.data();
    if (call.alibi_slopes) one.call.alibi_slopes += b * call.alibi_stride_b;
    if (call.attn_mask) {
      one.call.attn_mask = static_cast<const char*>(call.attn_mask) +
                           b * call.mask_stride_b * size_of(call.mask_dtype);
    }
    one.dout = from_token(all.dout, first, all.dout_stride, call.dtype);
    if (all.dlse) one.dlse = copy_rows(all.dlse, heads, call.q_tokens, first, rows, dlse);
    one.dq = from_token(all.dq, first, all.dq_stride, call.dtype);
    one.dk = from_token(all.dk, begin, all.dk_stride, call.dtype);
    one.dv = from_token(all.dv, begin, all.dv_stride, call.dtype);
    if (all.dslopes) one.dslopes += b * heads;
    if (all.dsinks) one.dsinks = dsinks.data();
    cpu::KeyRanges own = ranges;
    if (own.data) own.data += b * own.stride_b;
    cpu::attention_backward(one, pool, batch_invariant, own, b);
    for (int64_t h = 0; all.dsinks && h < heads; ++h) all.dsinks[h] += dsinks[h];
  }
}

}  // namespace

Gradients attention_backward_cpu(const Inputs& in, const Results& results) {
  const Call call(in);
  check_results(in, results, check_cpu);
  auto [gradients, params] = add_gradients(call.params, in, results);
  if (in.q_offsets) {
    backward_of_sequences(params, torch_threads(), in.batch_invariant, call.key_ranges);
  } else {
    cpu::attention_backward(params, torch_threads(), in.batch_invariant, call.key_ranges);
  }
  return gradients;
}

}  // namespace gqa::host
