#include "stream_lookup_cuda.h"

#include <dlfcn.h>

namespace gqa::host {

GetStream find_get_stream() {
  // Python loads libtorch_cuda with local scope, and this library does not depend on it, so
  // RTLD_DEFAULT does not find it. RTLD_NOLOAD returns a handle if it is loaded. A torch that is
  // linked into one file has no library of that name; then the whole process is searched.
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* scope = library != nullptr ? library : RTLD_DEFAULT;
  return reinterpret_cast<GetStream>(dlsym(scope, "aoti_torch_get_current_cuda_stream"));
}

}  // namespace gqa::host
