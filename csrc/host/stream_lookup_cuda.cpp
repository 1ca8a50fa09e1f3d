#include "stream_lookup_cuda.h"

#include <dlfcn.h>

namespace gqa::host {

GetStream find_get_stream() {
  // Python loads libtorch_cuda with local scope, and nothing that this library needs leads to it:
  // RTLD_DEFAULT does not see it. RTLD_NOLOAD gives a handle of the library if it is loaded. A
  // torch that is linked into one file has no library of that name, and is searched as a whole.
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* scope = library != nullptr ? library : RTLD_DEFAULT;
  return reinterpret_cast<GetStream>(dlsym(scope, "aoti_torch_get_current_cuda_stream"));
}

}  // namespace gqa::host
