#include "attention.h"

#include <stdexcept>
#include <string>

#include "launch.h"
#include "sm80/decode/launch.h"
#include "sm80/prefill/launch.h"
#ifdef GQA_CUDA_SM90
#include "sm90/prefill/launch.h"
#endif

namespace gqa::cuda {
namespace {

// If each head has at most as many rows as a decode tile, decode reads K and V no more often than
// prefill, which reads them once per query head.
constexpr int64_t kDecodeQueries = 16;
// Decode splits the keys. It therefore also takes longer queries if prefill's tiles would leave
// most of the device idle.
constexpr int64_t kPrefillRows = 128;

bool leaves_device_idle(const AttentionParams& params, const Device& device) {
  return params.q_len <= kPrefillRows && params.batch * params.num_heads * 2 < device.num_sms;
}

}  // namespace

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
    case Phase::kDecode: return sm80::decode_workspace_bytes(params, device);
#ifdef GQA_CUDA_SM90
    case Phase::kPrefillSm90: return sm90::prefill_workspace_bytes(params, device);
#endif
    default: return sm80::prefill_workspace_bytes(params, device);
  }
}

void attention_forward(const AttentionParams& params, Phase phase, void* workspace,
                       const Device& device, cudaStream_t stream) {
  switch (phase) {
    case Phase::kDecode: return sm80::decode(params, workspace, device, stream);
#ifdef GQA_CUDA_SM90
    case Phase::kPrefillSm90: return sm90::prefill(params, workspace, device, stream);
#endif
    default: return sm80::prefill(params, workspace, device, stream);
  }
}

}  // namespace gqa::cuda
