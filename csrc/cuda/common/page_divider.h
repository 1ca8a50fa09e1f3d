// Division by the page size without a division: a multiplication and a shift.
//
// With l = ceil(log2 d) and m = ceil(2^(31 + l) / d), n / d is n * m >> (31 + l) for all n < 2^31,
// because m * d exceeds 2^(31 + l) by less than 2^l (Granlund and Montgomery 1994). If d is a power
// of two, m is 2^31 and only the shift is left.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../core/host_device.h"

namespace gqa::cuda {

struct PageDivider {
  uint32_t multiplier, shift;

  // n / page size of an n below 2^31.
  GQA_HOST_DEVICE uint32_t quotient(uint32_t n) const {
    return static_cast<uint32_t>(uint64_t{n << 1} * multiplier >> 32) >> shift;
  }
};

// For any page size of at least 1. Slots are numbers below 2^31, so a larger page counts as 2^31.
inline PageDivider page_divider(int64_t page_size) {
  const uint64_t size = static_cast<uint64_t>(std::clamp<int64_t>(page_size, 1, INT32_MAX));
  uint32_t shift = 0;
  while ((uint64_t{1} << shift) < size) ++shift;
  const uint64_t power = uint64_t{1} << (31 + shift);
  return {static_cast<uint32_t>((power + size - 1) / size), shift};
}

}  // namespace gqa::cuda
