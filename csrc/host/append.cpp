#include "append.h"

#include "../cpu/append/append.h"
#include "append_inputs.h"
#include "call.h"

namespace gqa::host {

Tensor cache_append_cpu(const OptionalTensor& q, const Tensor& k_new, const Tensor& v_new, Tensor k,
                        Tensor v, const Tensor& kv_lengths, const OptionalTensor& page_table,
                        const OptionalTensor& kv_begin, const OptionalTensor& new_offsets,
                        OptionalTensor k_scale, OptionalTensor v_scale, OptionalTensor k_zero,
                        OptionalTensor v_zero, const OptionalTensor& rotary_cos,
                        const OptionalTensor& rotary_sin, bool rotary_interleaved) {
  const AppendInputs in{
      q,           k_new,   v_new,   k,      v,      kv_lengths, page_table, kv_begin,
      new_offsets, k_scale, v_scale, k_zero, v_zero, rotary_cos, rotary_sin, rotary_interleaved};
  const AppendedCache appended(in);
  const CacheInputs cache = appended.cache();
  const Call call(appended.inputs(), &cache);
  AppendParams params = params_of(in, call.params, check_cpu);
  Tensor rotated = add_rotated(params, in);
  cpu::cache_append(params, torch_threads());
  return rotated;
}

}  // namespace gqa::host
