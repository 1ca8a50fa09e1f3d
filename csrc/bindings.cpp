// Op schemas and which function implements each on which device; nothing else. Built on Torch's
// stable ABI: one binary serves every Torch from 2.10 on.
#include <torch/csrc/stable/library.h>

#include "host/attention.h"

// Tensors as AttentionInputs (gqa_kernels/inputs.py) normalises them; head maps int32. bshd: out's
// memory is [B, Sq, Hq, Dv]. Returns out [B, Hq, Sq, Dv] and the LSE, fp32 [B, Hq, Sq].
STABLE_TORCH_LIBRARY(gqa_kernels, library) {
  library.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor head_map, Tensor? value_head_map, "
      "Tensor? alibi_slopes, Tensor? sinks, Tensor? attn_mask, Tensor? kv_lengths, float scale, "
      "int window_left, int window_right, float softcap, bool bshd) -> (Tensor out, Tensor lse)");
}

STABLE_TORCH_LIBRARY_IMPL(gqa_kernels, CPU, library) {
  library.impl("attention_forward", TORCH_BOX(&gqa::host::attention_forward_cpu));
}
