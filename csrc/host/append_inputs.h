// The arguments of cache_append: checks and AppendParams. The same for every device.
#pragma once

#include "../core/append_params.h"
#include "inputs.h"

namespace gqa::host {

// As the op's schema has them; they live as long as the op runs.
struct AppendInputs {
  const OptionalTensor& q;
  const Tensor &k_new, &v_new;
  Tensor &k, &v;
  const Tensor& kv_lengths;
  const OptionalTensor &page_table, &kv_begin, &new_offsets;
  int64_t max_new;  // most new tokens of a sequence
  OptionalTensor &k_scale, &v_scale, &k_zero, &v_zero;
  const OptionalTensor &rotary_cos, &rotary_sin;
  bool rotary_interleaved;
};

// The cache of an append as one that new tokens attend to, each head of theirs a query head: what
// check_inputs and params_of take.
class AppendedCache {
 public:
  explicit AppendedCache(const AppendInputs& in);
  Inputs inputs() const;

 private:
  const AppendInputs& in_;
  OptionalTensor lengths_, none_;
  Tensor head_map_;  // of any values: appends have no use for it
};

// The call, after the checks that memory safety needs beyond those of its cache, whose parameters
// are `cache`. Without queries.
AppendParams params_of(const AppendInputs& in, const AttentionParams& cache,
                       void (*check_device)(const char* name, const Tensor& x, const Tensor& q));

// Memory for the rotated queries, entered into the params of the call; empty without queries.
Tensor add_rotated(AppendParams& params, const AppendInputs& in);

}  // namespace gqa::host
