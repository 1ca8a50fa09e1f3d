// Entry points of one phase's host code for cuda_harness.py. GQA_LAUNCH_HEADER, GQA_ARCH and
// GQA_PHASE name the phase, GQA_PARAMS the struct that it takes.
#include <cstdio>

#include GQA_LAUNCH_HEADER

#define GQA_JOIN(a, b) a##b
#define GQA_NAME(a, b) GQA_JOIN(a, b)

// An H100, but for its number of multiprocessors.
static gqa::cuda::Device device_with(int num_sms) { return {90, num_sms, 228 * 1024, 1024}; }

extern "C" {

size_t gqa_sizeof_params() { return sizeof(gqa::GQA_PARAMS); }
size_t gqa_workspace_bytes(const gqa::GQA_PARAMS* params, int num_sms) {
  return gqa::cuda::GQA_ARCH::GQA_NAME(GQA_PHASE, _workspace_bytes)(*params, device_with(num_sms));
}
void gqa_unsupported(const gqa::GQA_PARAMS* params, char* reason, size_t size) {
  std::snprintf(reason, size, "%s",
                gqa::cuda::GQA_ARCH::GQA_NAME(GQA_PHASE, _unsupported)(*params).c_str());
}
int gqa_run(const gqa::GQA_PARAMS* params, void* workspace, int num_sms, char* error, size_t size) {
  try {
    gqa::cuda::GQA_ARCH::GQA_PHASE(*params, workspace, device_with(num_sms), nullptr);
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(error, size, "%s", e.what());
    return 1;
  }
}

}  // extern "C"
