// Finds torch's current CUDA stream without linking torch's CUDA library, which a CPU build of
// torch does not have. Torch-free.
#pragma once

#include <cstdint>

namespace gqa::host {

// Writes a device's current stream and returns 0 on success.
using GetStream = int32_t (*)(int32_t device, void** stream);

// Torch's function, or null if torch was built without CUDA.
GetStream find_get_stream();

}  // namespace gqa::host
