// Whether this library's kernels run here, asked before the first call: without a kernel for the
// device, with a driver too old for the toolkit, or with a torch without CUDA none of them would.
#include <string>

#include "../cuda/probe.h"
#include "call_cuda.h"

// For callers without a header (gqa_kernels/native/build.py): null if an empty kernel could be
// launched on torch's current stream of the current device; else the reason, valid until the
// thread's next call.
extern "C" __attribute__((visibility("default"))) const char* gqa_kernels_cuda_probe() {
  thread_local std::string reason;
  try {
    int index = 0;
    gqa::cuda::check(cudaGetDevice(&index), "cudaGetDevice");
    gqa::cuda::current_device();
    gqa::cuda::launch_probe(gqa::host::current_stream(index));
    return nullptr;
  } catch (const std::exception& error) {
    reason = error.what();
    return reason.c_str();
  }
}
