// A call on the CPU: the checks and copies that only the host can make, besides those of inputs.h.
#pragma once

#include <cstdint>
#include <vector>

#include "../cpu/forward/attention.h"
#include "../cpu/key_ranges.h"
#include "inputs.h"

namespace gqa::host {

// Checks the arguments, their values included. Owns the arrays that its params point to.
class Call {
 public:
  explicit Call(const Inputs& in);
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  AttentionParams params;  // without outputs
  cpu::KeyRanges key_ranges;

 private:
  void copy_begins(const Inputs& in);
  void copy_offsets(const Inputs& in);
  void check_packed_queries(const Tensor& x) const;
  void check_packed_mask(const Tensor& mask) const;

  std::vector<int32_t> key_map_, value_map_, kv_begin_, q_offsets_;
  std::vector<float> sinks_;
  std::vector<int64_t> dropout_seed_;
};

void check_cpu(const char* name, const Tensor& x, const Tensor& q);

// The caller's threads: torch's own pool.
cpu::ThreadPool torch_threads();

}  // namespace gqa::host
