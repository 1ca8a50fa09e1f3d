// The arguments of cache_keep: checks and KeepParams. The same for every device.
#pragma once

#include "../core/keep_params.h"
#include "inputs.h"

namespace gqa::host {

// The arguments of the op's schema. They live as long as the op runs.
struct KeepInputs {
  const Tensor &indices, &counts;
  Tensor &k, &v;
  const Tensor& kv_lengths;
  const OptionalTensor &page_table, &kv_begin;
  OptionalTensor &k_scale, &v_scale, &k_zero, &v_zero;
};

// Presents the cache of a keep as one that a call without queries attends to. check_inputs and
// params_of accept this form, and check what a keep needs.
class KeptCache {
 public:
  explicit KeptCache(const KeepInputs& in);
  Inputs inputs() const;

 private:
  const KeepInputs& in_;
  OptionalTensor lengths_, none_;
  Tensor q_, head_map_;  // without elements
};

// Checks indices and counts, and returns the keep of a cache whose parameters are `cache`.
KeepParams params_of(const KeepInputs& in, const AttentionParams& cache,
                     void (*check_device)(const char* name, const Tensor& x, const Tensor& q));

}  // namespace gqa::host
