// An empty kernel, compiled like the others. If it can't be launched, they can't either.
#include "probe.h"

namespace gqa::cuda {
namespace {

struct NoParams {};

__global__ void probe_kernel(NoParams) {}

}  // namespace

void launch_probe(cudaStream_t stream) {
  launch_kernel("probe", probe_kernel, dim3(1), 1, 0, stream, NoParams{});
}

}  // namespace gqa::cuda
