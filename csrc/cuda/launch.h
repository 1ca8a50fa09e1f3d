// The common interface of every phase's launch.h, and code that launches share. Torch-free.
//
// A phase is a folder, cuda/<arch>/<phase>, whose launch.h declares, in gqa::cuda::<arch>:
//
//   // Why the phase can't run these parameters, with names and values; empty: it can. Looks at
//   // shapes, strides, types and whether pointers are null or aligned; never at what they point
//   to. std::string <phase>_unsupported(const AttentionParams&); bool <phase>_supported(const
//   AttentionParams&); size_t <phase>_workspace_bytes(const AttentionParams&, const Device&); void
//   <phase>(const AttentionParams&, void* workspace, const Device&, cudaStream_t);
//
// A backward takes BackwardParams, an append AppendParams. Pointers in them are device pointers:
// the host never reads maps, lengths or tables, so launches depend on shapes only and may be
// captured in a CUDA graph. The workspace is 256-byte aligned and need not be initialised. One .cu
// per (dtype, head-dim class) instantiates the kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "../core/params.h"

namespace gqa::cuda {

// Throws std::runtime_error with the name of the call and the CUDA runtime's message.
inline void check(cudaError_t status, const char* call) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(call) + " failed: " + cudaGetErrorString(status));
  }
}

// Whether rows of `dim` elements consist of whole 16-byte chunks.
inline bool in_chunks(const void* data, const Strides& strides, int64_t dim) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides.b % 8 == 0 && strides.h % 8 == 0 &&
         strides.s % 8 == 0 && dim % 8 == 0;
}

// Launches kernel<<<grid, block, shared_bytes, stream>>>(params) and permits that much dynamic
// shared memory. `name` is for the error message.
template <class Params>
void launch_kernel(const char* name, void (*kernel)(Params), dim3 grid, int block, int shared_bytes,
                   cudaStream_t stream, const Params& params) {
  constexpr int kAlwaysAllowed = 48 * 1024;
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > kAlwaysAllowed) {
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
          name);
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  check(cudaLaunchKernel(function, grid, dim3(block), arguments, shared_bytes, stream), name);
}

// The same for a kernel whose first step is wait_for_kernel_before (common/ptx.cuh). From Hopper
// on, its CTAs start while the preceding kernel ends, which saves the time between launches. Code
// compiled for older devices can't wait, so it must not start early.
template <class Params>
void launch_kernel_after(const char* name, void (*kernel)(Params), dim3 grid, int block,
                         cudaStream_t stream, const Params& params) {
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaFuncAttributes code;
  check(cudaFuncGetAttributes(&code, function), name);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(block);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = code.ptxVersion >= 90 ? 1 : 0;
  void* arguments[] = {const_cast<Params*>(&params)};
  check(cudaLaunchKernelExC(&config, function, arguments), name);
}

}  // namespace gqa::cuda
