#include "attention.h"

#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "launch.h"
#include "sm80/decode/launch.h"
#include "sm80/prefill/launch.h"
#ifdef GQA_CUDA_SM90
#include "sm90/prefill/launch.h"
#endif

namespace gqa::cuda {
namespace {

// Up to a decode tile's rows per head, decode reads K and V no more often than prefill, which reads
// them once per query head.
constexpr int64_t kDecodeQueries = 16;
// Decode splits the keys: it takes longer queries too where prefill's tiles would leave most of the
// device idle.
constexpr int64_t kPrefillRows = 128;

bool leaves_device_idle(const AttentionParams& params, const Device& device) {
  return params.q_len <= kPrefillRows && params.batch * params.num_heads * 2 < device.num_sms;
}

}  // namespace

Device current_device() {
  static std::mutex mutex;
  static std::vector<Device> known;
  int index = 0;
  check(cudaGetDevice(&index), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  if (known.size() <= static_cast<size_t>(index)) known.resize(index + 1);
  Device& device = known[index];
  if (device.num_sms == 0) {
    int major = 0, minor = 0, num_sms = 0;
    const char* name = "cudaDeviceGetAttribute";
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), name);
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index), name);
    check(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, index), name);
    device = {10 * major + minor, num_sms};
  }
  return device;
}

Phase choose_phase(const AttentionParams& params, const Device& device) {
  const std::string decode_reason = sm80::decode_unsupported(params);
  const bool few = params.q_len <= kDecodeQueries || leaves_device_idle(params, device);
  if (few && decode_reason.empty()) return Phase::kDecode;
  std::string reasons = "sm80 decode: " + decode_reason;
#ifdef GQA_CUDA_SM90
  if (device.capability / 10 == 9) {
    const std::string reason = sm90::prefill_unsupported(params);
    if (reason.empty()) return Phase::kPrefillSm90;
    reasons += "; sm90 prefill: " + reason;
  }
#endif
  const std::string reason = sm80::prefill_unsupported(params);
  if (reason.empty()) return Phase::kPrefillSm80;
  if (decode_reason.empty()) return Phase::kDecode;
  throw std::runtime_error("no CUDA kernel can run this call: " + reasons +
                           "; sm80 prefill: " + reason);
}

size_t workspace_bytes(const AttentionParams& params, Phase phase, const Device& device) {
  switch (phase) {
    case Phase::kDecode: return sm80::decode_workspace_bytes(params, device.num_sms);
#ifdef GQA_CUDA_SM90
    case Phase::kPrefillSm90: return sm90::prefill_workspace_bytes(params, device.num_sms);
#endif
    default: return sm80::prefill_workspace_bytes(params, device.num_sms);
  }
}

void attention_forward(const AttentionParams& params, Phase phase, void* workspace,
                       const Device& device, cudaStream_t stream) {
  switch (phase) {
    case Phase::kDecode: return sm80::decode(params, workspace, device.num_sms, stream);
#ifdef GQA_CUDA_SM90
    case Phase::kPrefillSm90: return sm90::prefill(params, workspace, device.num_sms, stream);
#endif
    default: return sm80::prefill(params, workspace, device.num_sms, stream);
  }
}

}  // namespace gqa::cuda
