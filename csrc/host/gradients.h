// What the backward ops add to inputs.h: the forward's results and their gradients, checks of them,
// outputs, and BackwardParams. The same for every device.
#pragma once

#include <tuple>

#include "../core/backward_params.h"
#include "inputs.h"

namespace gqa::host {

// The forward's results, their gradients, and which of the optional gradients are wanted.
struct Results {
  const Tensor& dout;
  const OptionalTensor& dlse;
  const Tensor &out, &lse;
  bool need_slopes, need_sinks;
};

// dq, dk, dv, dslopes, dsinks; the latter two are empty where they are not wanted.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// As check_inputs, after it.
void check_results(const Inputs& in, const Results& results,
                   void (*check_device)(const char* name, const Tensor& x, const Tensor& q));

// Gradients in memory of their own, and the params to compute them with. `call`: without outputs.
// Of packed sequences (q_offsets), which all see k and v through a batch stride of 0, dk and dv
// have a batch of 1, and are zeros at tokens of no sequence, as dq is.
std::pair<Gradients, BackwardParams> add_gradients(const AttentionParams& call, const Inputs& in,
                                                   const Results& results);

}  // namespace gqa::host
