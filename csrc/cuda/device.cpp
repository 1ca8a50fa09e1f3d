#include "device.h"

#include <cuda_runtime_api.h>

#include <mutex>
#include <vector>

#include "launch.h"

namespace gqa::cuda {

Device current_device() {
  static std::mutex mutex;
  static std::vector<Device> known;
  int index = 0;
  check(cudaGetDevice(&index), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  if (known.size() <= static_cast<size_t>(index)) known.resize(index + 1);
  Device& device = known[index];
  if (device.num_sms == 0) {
    const auto fact = [&](cudaDeviceAttr attribute) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, attribute, index), "cudaDeviceGetAttribute");
      return value;
    };
    const int capability =
        10 * fact(cudaDevAttrComputeCapabilityMajor) + fact(cudaDevAttrComputeCapabilityMinor);
    device = {capability, fact(cudaDevAttrMultiProcessorCount),
              fact(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
              fact(cudaDevAttrReservedSharedMemoryPerBlock)};
  }
  return device;
}

}  // namespace gqa::cuda
