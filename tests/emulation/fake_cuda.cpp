// A CUDA runtime without a device: the product's own host code is linked with it in place of
// libcudart. It rejects what a real one rejects, and reports all else to a hook (fake_cuda.h), which
// may run a launch in the emulator. Host code can't call functions that are not defined here.
#include "fake_cuda.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstring>
#include <map>
#include <set>
#include <string>
#include <utility>

namespace {

constexpr int kReserved = 1024;               // shared memory of a block that the system takes
constexpr size_t kAlwaysAllowed = 48 * 1024;  // dynamic shared memory without an attribute

struct Device {
  int capability = 80, num_sms = 4, shared_limit = 227 * 1024;
};

GqaHook hook = nullptr;
std::map<const void*, std::string> kernels;
std::map<int, Device> devices;
int current = 0;
std::map<const void*, int> streams;  // to their device
std::set<const void*> captured_streams;
std::map<std::pair<const void*, int>, int> shared_limits;  // of a function on a device

const Device& device(int index) { return devices[index]; }

bool is_captured(cudaStream_t stream) { return captured_streams.count(stream) != 0; }

// What a stream makes impossible.
cudaError_t check_stream(cudaStream_t stream) {
  if (stream == nullptr) {
    // The default stream waits for all others: not while one is captured.
    return captured_streams.empty() ? cudaSuccess : cudaErrorStreamCaptureImplicit;
  }
  const auto found = streams.find(stream);
  const bool usable = found != streams.end() && found->second == current;
  return usable ? cudaSuccess : cudaErrorInvalidResourceHandle;
}

GqaEvent event_of(const char* kind, const char* name, cudaStream_t stream = nullptr) {
  GqaEvent event{};
  event.kind = kind;
  event.name = name;
  event.stream = stream;
  event.captured = stream != nullptr && is_captured(stream);
  return event;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** arguments,
                   size_t shared_bytes, cudaStream_t stream, const unsigned* cluster,
                   bool starts_early = false) {
  const auto kernel = kernels.find(function);
  if (kernel == kernels.end()) return cudaErrorInvalidDeviceFunction;
  if (const cudaError_t error = check_stream(stream); error != cudaSuccess) return error;
  const auto limit = shared_limits.find({function, current});
  const size_t allowed = limit == shared_limits.end() ? kAlwaysAllowed : limit->second;
  const auto threads = uint64_t{block.x} * block.y * block.z;
  if (!grid.x || !grid.y || !grid.z || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535 ||
      threads < 1 || threads > 1024 || block.z > 64) {
    return cudaErrorInvalidConfiguration;
  }
  if (shared_bytes > allowed) return cudaErrorInvalidValue;
  GqaEvent event = event_of("launch", kernel->second.c_str(), stream);
  const unsigned shape[6] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
  std::memcpy(event.grid, shape, sizeof(event.grid));
  std::memcpy(event.block, shape + 3, sizeof(event.block));
  std::memcpy(event.cluster, cluster, sizeof(event.cluster));
  event.shared_bytes = shared_bytes;
  event.arguments = arguments;
  event.value = starts_early;
  return static_cast<cudaError_t>(gqa_tell(event));
}

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
  return static_cast<CUresult>(gqa_tell(event_of("encode", "cuTensorMapEncodeTiled")));
}

}  // namespace

int gqa_tell(GqaEvent event) {
  event.device = current;
  return hook == nullptr ? 0 : hook(&event);
}

extern "C" {

void gqa_set_hook(GqaHook new_hook) { hook = new_hook; }
void gqa_set_device(int index, int capability, int num_sms, int shared_limit) {
  devices[index] = {capability, num_sms, shared_limit};
}
void gqa_set_current_device(int index) { current = index; }
int gqa_current_device() { return current; }
void gqa_add_stream(int index, const void* stream) { streams[stream] = index; }
void gqa_capture(const void* stream, int begin) {
  if (begin) captured_streams.insert(stream);
  if (!begin) captured_streams.erase(stream);
}
void gqa_reset() {
  hook = nullptr;
  devices.clear();
  current = 0;
  streams.clear();
  captured_streams.clear();
  shared_limits.clear();
}

// What the compiler's own code calls.
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
                             size_t shared_bytes, cudaStream_t stream) {
  const unsigned cluster[3] = {1, 1, 1};
  return launch(function, grid, block, arguments, shared_bytes, stream, cluster);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                void** arguments) {
  unsigned cluster[3] = {1, 1, 1};
  bool starts_early = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) {
      const auto& dim = config->attrs[i].val.clusterDim;
      cluster[0] = dim.x, cluster[1] = dim.y, cluster[2] = dim.z;
    }
    if (config->attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization) {
      starts_early = config->attrs[i].val.programmaticStreamSerializationAllowed != 0;
    }
  }
  return launch(function, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes,
                config->stream, cluster, starts_early);
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  if (kernels.find(function) == kernels.end()) return cudaErrorInvalidDeviceFunction;
  *attributes = {};
  // As of a library with code for every device.
  attributes->binaryVersion = attributes->ptxVersion = device(current).capability;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  const auto kernel = kernels.find(function);
  if (kernel == kernels.end()) return cudaErrorInvalidDeviceFunction;
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 || value > device(current).shared_limit) return cudaErrorInvalidValue;
    shared_limits[{function, current}] = value;
  }
  GqaEvent event = event_of("attribute", kernel->second.c_str());
  event.value = value;
  return static_cast<cudaError_t>(gqa_tell(event));
}
cudaError_t cudaMemsetAsync(void* address, int value, size_t size, cudaStream_t stream) {
  if (const cudaError_t error = check_stream(stream); error != cudaSuccess) return error;
  GqaEvent event = event_of("memset", "cudaMemsetAsync", stream);
  event.address = address;
  event.bytes = size;
  event.value = value;
  const int error = gqa_tell(event);
  if (error == 0 && !event.captured) std::memset(address, value, size);
  return static_cast<cudaError_t>(error);
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (is_captured(stream)) return cudaErrorStreamCaptureUnsupported;
  return static_cast<cudaError_t>(
      gqa_tell(event_of("synchronize", "cudaStreamSynchronize", stream)));
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDeviceFunction: return "invalid device function";
    case cudaErrorInvalidResourceHandle: return "invalid resource handle";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureImplicit:
      return "operation would make the legacy stream depend on a capturing blocking stream";
    default: return "unknown error";
  }
}
cudaError_t cudaGetDevice(int* index) { return *index = current, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  const Device& facts = device(index);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = facts.capability / 10; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = facts.capability % 10; return cudaSuccess;
    case cudaDevAttrMultiProcessorCount: *value = facts.num_sms; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = facts.shared_limit; return cudaSuccess;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = kReserved; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = facts.shared_limit + kReserved;
      return cudaSuccess;
    default: return cudaErrorInvalidValue;
  }
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  *function = nullptr;
  *status = cudaDriverEntryPointSymbolNotFound;
  const int error = gqa_tell(event_of("symbol", symbol));
  // Success without the symbol is what a driver answers that is too old for it.
  if (error == cudaErrorSymbolNotFound) return cudaSuccess;
  if (error == 0 && std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0) {
    *function = reinterpret_cast<void*>(&encode_tiled);
    *status = cudaDriverEntryPointSuccess;
  }
  return static_cast<cudaError_t>(error);
}

}  // extern "C"
