// Facts about a device that numbers of splits, workspaces and phases depend on.
#pragma once

#include <algorithm>

namespace gqa::cuda {

struct Device {
  int capability;  // 10 * major + minor
  int num_sms;
  int shared_per_sm;    // bytes of shared memory
  int reserved_shared;  // of these, what the system takes for each CTA
};

// The current device's facts, queried once per device. Throws std::runtime_error.
Device current_device();

// CTAs of `shared_bytes` that an SM runs at once, at most `by_registers`.
inline int ctas_per_sm(const Device& device, int shared_bytes, int by_registers) {
  const int by_shared = device.shared_per_sm / (shared_bytes + device.reserved_shared);
  return std::max(1, std::min(by_shared, by_registers));
}

}  // namespace gqa::cuda
