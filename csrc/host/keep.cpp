#include "keep.h"

#include "../cpu/keep/keep.h"
#include "call.h"

namespace gqa::host {

void cache_keep_cpu(const KeepInputs& in) {
  const KeptCache kept(in);
  const Call call(kept.inputs());
  cpu::cache_keep(params_of(in, call.params, check_cpu), torch_threads());
}

}  // namespace gqa::host
