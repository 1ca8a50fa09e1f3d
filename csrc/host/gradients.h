// What the backward ops add to inputs.h: the forward's results and their gradients, their checks,
// outputs, and BackwardParams. The same for every device.
#pragma once

#include <tuple>

#include "../core/backward_params.h"
#include "inputs.h"

namespace gqa::host {

// The forward's results, their gradients, and which optional gradients are requested.
struct Results {
  const Tensor& dout;
  const OptionalTensor& dlse;
  const Tensor &out, &lse;
  bool need_slopes, need_sinks;
};

// dq, dk, dv, dslopes, dsinks. The last two are empty if not requested.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Call it after check_inputs; it throws the same kinds of errors.
void check_results(const Inputs& in, const Results& results,
                   void (*check_device)(const char* name, const Tensor& x, const Tensor& q));

// Allocates the gradients and returns the params to compute them with. `call` has no outputs.
// Packed sequences (q_offsets) read k and v with a batch stride of 0, so dk and dv have a batch of
// 1. dq, dk and dv are zero at tokens that belong to no sequence.
std::pair<Gradients, BackwardParams> add_gradients(const AttentionParams& call, const Inputs& in,
                                                   const Results& results);

}  // namespace gqa::host
