// 16- and 8-bit numbers to fp32 and back, one at a time, on any processor.
#pragma once

#include <cstdint>
#include <cstring>

#include "../../core/params.h"
#include "isa.h"

namespace gqa::cpu::GQA_ISA {

#if defined(__ARM_FP16_FORMAT_IEEE)
GQA_INLINE float to_float(Float16 x) {
  __fp16 value;
  std::memcpy(&value, &x, sizeof value);
  return value;
}
GQA_INLINE Float16 to_float16(float x) {
  const __fp16 value = x;
  Float16 result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}
#else
GQA_INLINE float to_float(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  // Read as fp32, the exponent is 112 too small; multiplying by 2^112 also normalises subnormals.
  float value;
  std::memcpy(&value, &magnitude, sizeof value);
  value *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (magnitude >= 0x0f800000u) bits |= 0x7f800000u;  // infinity and NaN keep their exponent
  bits |= sign;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
GQA_INLINE Float16 to_float16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  uint32_t half;
  if (bits > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (bits >= 0x477ff000u) {
    half = 0x7c00u;  // rounds to 65536 or more: infinity
  } else if (bits < 0x38800000u) {
    // Below 2^-14: the sum with 0.5 rounds (to nearest even) at 2^-24, the step of fp16 subnormals.
    float value;
    std::memcpy(&value, &bits, sizeof value);
    value += 0.5f;
    std::memcpy(&half, &value, sizeof half);
    half -= 0x3f000000u;
  } else {
    half = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;  // nearest even
  }
  return {static_cast<uint16_t>(sign | half)};
}
#endif

GQA_INLINE float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
GQA_INLINE BFloat16 to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0u};  // NaN
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

GQA_INLINE float to_float(Float8E5M2 x) {
  return to_float(Float16{static_cast<uint16_t>(x.bits << 8)});
}
// 1/256 of the value: fp16's exponent bias is 8 more, and so subnormals stay exact.
GQA_INLINE float to_float(Float8E4M3 x) {
  const int magnitude = x.bits & 0x7f;
  const int bits = magnitude == 0x7f ? 0x7e00 : magnitude << 7;
  return to_float(Float16{static_cast<uint16_t>((x.bits & 0x80) << 8 | bits)});
}
GQA_INLINE float to_float(Int8 x) { return x.value; }

// fp8 numbers S that vectors load by shifting bits only: products_fp8.h.
template <class S>
struct BitShiftedFp8 {
  uint8_t bits;
};
template <class S>
inline constexpr bool kBitShifted = false;
template <class S>
inline constexpr bool kBitShifted<BitShiftedFp8<S>> = true;

}  // namespace gqa::cpu::GQA_ISA
