// The arguments of cache_append: checks and AppendParams. The same for every device.
#pragma once

#include "../core/append_params.h"
#include "inputs.h"

namespace gqa::host {

// The arguments of the op's schema. They live as long as the op runs.
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

// Presents the cache of an append as one that the new tokens attend to, with each of their heads as
// a query head. check_inputs and params_of accept this form.
class AppendedCache {
 public:
  explicit AppendedCache(const AppendInputs& in);
  Inputs inputs() const;

 private:
  const AppendInputs& in_;
  OptionalTensor lengths_, none_;
  Tensor head_map_;  // uninitialised: appends don't use it
};

// Checks what memory safety requires besides the checks of the cache, whose parameters are `cache`,
// and returns the call without queries.
AppendParams params_of(const AppendInputs& in, const AttentionParams& cache,
                       void (*check_device)(const char* name, const Tensor& x, const Tensor& q));

// Allocates the rotated queries and enters them into the call's params; empty without queries.
Tensor add_rotated(AppendParams& params, const AppendInputs& in);

}  // namespace gqa::host
