#include "append.h"

#include "../cpu/append/append.h"
#include "call.h"

namespace gqa::host {

Tensor cache_append_cpu(const AppendInputs& in) {
  const AppendedCache appended(in);
  const Call call(appended.inputs());
  AppendParams params = params_of(in, call.params, check_cpu);
  Tensor rotated = add_rotated(params, in);
  cpu::cache_append(params, torch_threads());
  return rotated;
}

}  // namespace gqa::host
