// Registers the function that implements each op on CUDA devices (schemas:
// gqa_kernels/native/schema.py). The library contains this file only if nvcc compiled the kernels.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>

#include "host/append.h"
#include "host/attention.h"
#include "host/backward.h"
#include "host/keep.h"

using namespace gqa::host;

STABLE_TORCH_LIBRARY_IMPL(gqa_kernels, CUDA, library) {
  library.impl("attention_forward", TORCH_BOX(&attention<attention_forward_cuda>));
  library.impl("attention_output", TORCH_BOX(&attention_output<attention_output_cuda>));
  library.impl("attention_dense_output", TORCH_BOX(&attention_dense_output<attention_output_cuda>));
  library.impl("attention_backward", TORCH_BOX(&attention_backward<attention_backward_cuda>));
  library.impl("cache_append", TORCH_BOX(&cache_append<cache_append_cuda>));
  library.impl("cache_keep", TORCH_BOX(&cache_keep<cache_keep_cuda>));
}

// gqa_kernels/native/cuda_build.py searches the file for this text, to find out whether the library
// has CUDA kernels and how they were built.
#define GQA_TEXT(x) #x
#define GQA_VALUE(x) GQA_TEXT(x)
extern "C" __attribute__((visibility("default"))) const char gqa_kernels_cuda_build[] =
    "gqa_kernels CUDA build " GQA_VALUE(CUDART_VERSION) " " GQA_VALUE(GQA_CUDA_ARCHS);
