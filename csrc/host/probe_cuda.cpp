// Checks before the first call whether this library's kernels run here. They do not if none was
// compiled for the device, if the driver is older than the toolkit, or if torch has no CUDA.
#include <string>

#include "../cuda/probe.h"
#include "call_cuda.h"

// Called without a header (gqa_kernels/native/build.py). Launches an empty kernel on torch's
// current stream of the current device. Returns null on success, else the reason, which is valid
// until the thread's next call.
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
