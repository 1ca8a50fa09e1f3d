// What the fake CUDA runtime (fake_cuda.cpp) tells its user of each call, and how it is set up.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

// One call that changes something, after the checks that the real runtime makes. `kind`: "launch",
// "memset", "attribute", "encode", "symbol", "guard", "stream", "free" or "synchronize".
struct GqaEvent {
  const char* kind;
  const char* name;  // of the kernel or function
  unsigned grid[3], block[3], cluster[3];
  size_t shared_bytes;  // dynamic
  const void* stream;
  int device;    // the current one
  int captured;  // becomes a node of the graph that the stream is captured into
  void** arguments;
  const void* address;  // of a memset, a tensor that is freed
  size_t bytes;
  int64_t value;  // set by a memset or an attribute; of a launch: 1 if it may start early
};

// Returns the error that the call fails with, 0 for success.
using GqaHook = int (*)(const GqaEvent* event);

void gqa_set_hook(GqaHook hook);
// The facts of device `index`; without them it has capability 8.0 and 4 multiprocessors.
void gqa_set_device(int index, int capability, int num_sms, int shared_limit);
void gqa_set_current_device(int index);
int gqa_current_device();
// Streams are known by their address alone; a null stream is every device's default stream.
void gqa_add_stream(int device, const void* stream);
void gqa_capture(const void* stream, int begin);
// Functions without attributes, as at the start of a program; no devices, streams or captures.
void gqa_reset();

}  // extern "C"

// Tells the hook of an event on the current device.
int gqa_tell(GqaEvent event);
