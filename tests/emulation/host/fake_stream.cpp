// Stands in for libtorch_cuda.so: torch's current streams.
#include <cstdint>
#include <map>

namespace {
std::map<int32_t, void*> streams;
}

extern "C" {

void gqa_set_stream(int32_t device, void* stream) { streams[device] = stream; }

int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  const auto found = streams.find(device);
  if (found == streams.end()) return 1;
  *stream = found->second;
  return 0;
}

}  // extern "C"
