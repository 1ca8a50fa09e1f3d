// What the forward and the backward of a call have in common: its checks and its AttentionParams.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "../core/params.h"
#include "../cpu/attention.h"

namespace gqa::host {

using OptionalTensor = std::optional<torch::stable::Tensor>;

// Where K and V of a call lie if they are a cache's, as the ops' schemas have it.
struct CacheArguments {
  const OptionalTensor &page_table, &kv_begin, &q_offsets, &k_scale, &v_scale, &k_zero, &v_zero;
};

// The tensors and options of a call, as the ops' schemas have them.
struct CallArguments {
  const torch::stable::Tensor &q, &k, &v, &head_map;
  const OptionalTensor &value_head_map, &alibi_slopes, &sinks, &attn_mask, &kv_lengths;
  double scale;
  int64_t window_left, window_right;
  double softcap, dropout_p;
  const OptionalTensor& dropout_seed;  // int64 [2]: seed, offset
  const CacheArguments* cache = nullptr;
};

// Checks the arguments; owns what its params point to beside the tensors.
class Call {
 public:
  explicit Call(const CallArguments& arguments);
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  AttentionParams params{};  // without out and lse

 private:
  void set_cache(const CallArguments& arguments);

  std::vector<int32_t> key_map_, value_map_, kv_begin_, q_offsets_;
  std::vector<float> sink_logits_;
};

Strides strides_of(const torch::stable::Tensor& x);

// The caller's threads: torch's own pool.
cpu::ThreadPool torch_threads();

}  // namespace gqa::host
