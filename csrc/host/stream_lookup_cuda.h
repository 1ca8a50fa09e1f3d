// How this library finds torch's current CUDA stream without linking torch's CUDA library, which a
// CPU build of torch does not have. Torch-free.
#pragma once

#include <cstdint>

namespace gqa::host {

// Writes a device's current stream; 0: done.
using GetStream = int32_t (*)(int32_t device, void** stream);

// Torch's function, or null where torch was built without CUDA.
GetStream find_get_stream();

}  // namespace gqa::host
