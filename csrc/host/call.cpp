#include "call.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../core/visible.h"
#include "../cpu/limits.h"

namespace gqa::host {
namespace {

// The elements of a small 1-D tensor with any stride.
template <class T>
std::vector<T> elements_of(const Tensor& x) {
  const T* data = static_cast<const T*>(x.const_data_ptr());
  std::vector<T> elements(x.numel());
  for (size_t i = 0; i < elements.size(); ++i)
    elements[i] = data[static_cast<int64_t>(i) * x.stride(0)];
  return elements;
}

}  // namespace

void check_cpu(const char* name, const Tensor& x, const Tensor&) {
  STD_TORCH_CHECK(x.is_cpu(), name, " must be on the CPU, got another device");
}

cpu::ThreadPool torch_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int64_t n, void (*body)(void*, int64_t), void* context) {
            torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body(context, i);
            });
          }};
}

Call::Call(const Inputs& in) {
  check_inputs(in, cpu::kMaxHeadDim, check_cpu);
  params = params_of(in);
  key_map_ = elements_of<int32_t>(in.head_map);
  params.head_map = key_map_.data();
  if (in.value_head_map) {
    value_map_ = elements_of<int32_t>(*in.value_head_map);
    params.value_head_map = value_map_.data();
  }
  if (in.sinks) {
    sinks_ = elements_of<float>(*in.sinks);
    params.sinks = sinks_.data();
  }
  if (in.dropout_p > 0) {
    dropout_seed_ = elements_of<int64_t>(*in.dropout_seed);
    params.dropout_seed = dropout_seed_.data();
  }
  if (in.kv_begin) copy_begins(in);
  if (in.q_offsets) copy_offsets(in);
  if (in.q_offsets && in.attn_mask) check_packed_mask(*in.attn_mask);
  if (in.key_ranges) {
    if (in.q_offsets) check_packed_queries(*in.key_ranges);
    const Strides strides = strides_of(*in.key_ranges);
    key_ranges = {static_cast<const int32_t*>(in.key_ranges->const_data_ptr()), strides.b,
                  strides.h, strides.s};
  }
}

void Call::copy_begins(const Inputs& in) {
  kv_begin_ = elements_of<int32_t>(*in.kv_begin);
  params.kv_begin = kv_begin_.data();
  for (const int32_t begin : kv_begin_) {
    STD_TORCH_CHECK(begin >= 0 && begin <= params.kv_len, "kv_begin must lie in [0, ",
                    params.kv_len, "], got ", begin);
  }
}

void Call::copy_offsets(const Inputs& in) {
  q_offsets_ = elements_of<int32_t>(*in.q_offsets);
  params.q_offsets = q_offsets_.data();
  params.q_len = 0;  // becomes the longest sequence, not just a bound of it
  for (size_t b = 0; b < q_offsets_.size(); ++b) {
    const int32_t offset = q_offsets_[b], last = b ? q_offsets_[b - 1] : 0;
    STD_TORCH_CHECK(b ? offset >= last && offset <= in.q.size(2) : offset == 0,
                    "q_offsets must ascend from 0 to at most q's tokens (", in.q.size(2), "), got ",
                    offset, " after ", last);
    if (b) params.q_len = std::max<int64_t>(params.q_len, offset - last);
  }
}

// A mask or key ranges of packed sequences must cover the longest sequence.
void Call::check_packed_queries(const Tensor& x) const {
  STD_TORCH_CHECK(params.q_len <= x.size(2), "max_q_len must be at least the longest sequence of ",
                  "q_offsets (", params.q_len, "), got ", x.size(2));
}

void Call::check_packed_mask(const Tensor& mask) const {
  check_packed_queries(mask);
  for (int64_t b = 0; b < params.batch; ++b) {
    for (int64_t h = 0; h < params.num_k_heads; ++h) {
      const int64_t keys = kv_length(params, b, h);
      STD_TORCH_CHECK(keys <= mask.size(3), "max_kv_len must be at least the keys of a sequence (",
                      keys, "), got ", mask.size(3));
    }
  }
}

}  // namespace gqa::host
