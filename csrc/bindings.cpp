// Registers the function that implements each op on the CPU. gqa_kernels/native/schema.py defines
// the ops before it loads this library. Built on Torch's stable ABI: one binary serves every Torch
// from 2.10 on.
#include <torch/csrc/stable/library.h>

#include "host/append.h"
#include "host/attention.h"
#include "host/backward.h"
#include "host/keep.h"
#include "host/slots.h"

using namespace gqa::host;

STABLE_TORCH_LIBRARY_IMPL(gqa_kernels, CPU, library) {
  library.impl("attention_forward", TORCH_BOX(&attention<attention_forward_cpu>));
  library.impl("attention_output", TORCH_BOX(&attention_output<attention_output_cpu>));
  library.impl("attention_dense_output", TORCH_BOX(&attention_dense_output<attention_output_cpu>));
  library.impl("attention_auxiliary",
               TORCH_BOX((&attention<attention_auxiliary_cpu, bool, int64_t>)));
  library.impl("attention_into",
               TORCH_BOX((&attention<attention_into_cpu, OptionalTensor, OptionalTensor>)));
  library.impl("attention_backward", TORCH_BOX(&attention_backward<attention_backward_cpu>));
  library.impl("cache_append", TORCH_BOX(&cache_append<cache_append_cpu>));
  library.impl("cache_keep", TORCH_BOX(&cache_keep<cache_keep_cpu>));
  library.impl("cache_slots_exist", TORCH_BOX(&cache_slots_exist_cpu));
}
