// A CUDA runtime without a device: the kernels' own host code is linked with it in place of
// libcudart, and each launch is handed to a hook, which has the emulator execute it
// (cuda_harness.py). GQA_LAUNCH_HEADER, GQA_ARCH and GQA_PHASE name the phase under test, GQA_PARAMS
// the struct that it takes.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <string>

#include GQA_LAUNCH_HEADER

#define GQA_JOIN(a, b) a##b
#define GQA_NAME(a, b) GQA_JOIN(a, b)

namespace {

using Hook = int (*)(const char* kernel, const unsigned* grid_and_block, size_t shared_bytes,
                     const unsigned* cluster, void** arguments);
Hook hook = nullptr;
std::map<const void*, std::string> kernels;
std::map<const void*, int> shared_limits;
int capability = 80;

// What the emulator makes a tensor map from; cuda_harness.py reads these fields.
struct RecordedMap {
  char magic[8];
  int32_t type, rank, swizzle, nan_fill;
  uint64_t address, dims[5], strides[4];
  uint8_t box_minus_one[5];
};
static_assert(sizeof(RecordedMap) <= sizeof(CUtensorMap));

CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                      const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box,
                      const cuuint32_t* element_strides, CUtensorMapInterleave,
                      CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                      CUtensorMapFloatOOBfill fill) {
  RecordedMap recorded{};
  std::memcpy(recorded.magic, "GQA-TMAP", 8);
  recorded.type = type;
  recorded.rank = static_cast<int32_t>(rank);
  recorded.swizzle = swizzle;
  recorded.nan_fill = fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
  recorded.address = reinterpret_cast<uint64_t>(address);
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (element_strides[i] != 1 || box[i] < 1 || box[i] > 256 || dims[i] < 1 ||
        dims[i] > (1ull << 32)) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    recorded.dims[i] = dims[i];
    recorded.box_minus_one[i] = static_cast<uint8_t>(box[i] - 1);
    if (i + 1 < rank) {
      if (strides[i] % 16 != 0 || strides[i] >= (1ull << 40)) return CUDA_ERROR_INVALID_VALUE;
      recorded.strides[i] = strides[i];
    }
  }
  if (recorded.address % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
  std::memset(map, 0, sizeof(*map));
  std::memcpy(map, &recorded, sizeof(recorded));
  return CUDA_SUCCESS;
}

cudaError_t record(const void* function, dim3 grid, dim3 block, void** arguments,
                   size_t shared_bytes, const unsigned* cluster) {
  constexpr size_t kAlwaysAllowed = 48 * 1024;
  const auto limit = shared_limits.find(function);
  const size_t allowed = limit == shared_limits.end() ? kAlwaysAllowed : limit->second;
  const unsigned shape[6] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
  if (shared_bytes > allowed || grid.y > 65535 || grid.z > 65535 || !grid.x || !grid.y || !grid.z) {
    return cudaErrorInvalidConfiguration;
  }
  return hook(kernels.at(function).c_str(), shape, shared_bytes, cluster, arguments)
             ? cudaErrorLaunchFailure
             : cudaSuccess;
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
  kernels[function] = name;
}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 1; }  // <<<>>>: not used
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorUnknown; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorUnknown; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  return cudaErrorUnknown;
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t) {
  const unsigned cluster[3] = {1, 1, 1};
  return record(function, grid, block, arguments, shared_bytes, cluster);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                void** arguments) {
  unsigned cluster[3] = {1, 1, 1};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) {
      const auto& dim = config->attrs[i].val.clusterDim;
      cluster[0] = dim.x, cluster[1] = dim.y, cluster[2] = dim.z;
    }
  }
  return record(function, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes,
                cluster);
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) shared_limits[function] = value;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* address, int value, size_t size, cudaStream_t) {
  std::memset(address, value, size);
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration" : "emulation failed";
}
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = capability / 10; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = capability % 10; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 * 1024; return cudaSuccess;
    default: return cudaErrorInvalidValue;
  }
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  const bool known = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(&encode_tiled) : nullptr;
  if (status) {
    *status = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  }
  return cudaSuccess;
}

// What cuda_harness.py calls.
void gqa_set_hook(Hook new_hook, int new_capability) {
  hook = new_hook;
  capability = new_capability;
}
size_t gqa_sizeof_params() { return sizeof(gqa::GQA_PARAMS); }
size_t gqa_workspace_bytes(const gqa::GQA_PARAMS* params, int num_sms) {
  return gqa::cuda::GQA_ARCH::GQA_NAME(GQA_PHASE, _workspace_bytes)(*params, num_sms);
}
void gqa_unsupported(const gqa::GQA_PARAMS* params, char* reason, size_t size) {
  std::snprintf(reason, size, "%s",
                gqa::cuda::GQA_ARCH::GQA_NAME(GQA_PHASE, _unsupported)(*params).c_str());
}
int gqa_run(const gqa::GQA_PARAMS* params, void* workspace, int num_sms, char* error,
            size_t size) {
  try {
    gqa::cuda::GQA_ARCH::GQA_PHASE(*params, workspace, num_sms, nullptr);
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(error, size, "%s", e.what());
    return 1;
  }
}

}  // extern "C"
