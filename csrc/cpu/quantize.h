// A row of numbers to stored numbers: value = (stored - zero) * scale. Defined by
// gqa_kernels/cache/quantized.py, bit for bit: true divisions, rounding to nearest even,
// saturation.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../core/params.h"
#include "isa.h"

namespace gqa::cpu::GQA_ISA {

struct Format {
  float low, high;       // smallest and largest stored number
  float symmetric_high;  // what a row's largest magnitude becomes where no zeros are kept
  float default_zero;
  bool integer;
};

template <class S>
inline constexpr Format kFormat{};
template <>
inline constexpr Format kFormat<Float8E4M3>{-448.0f, 448.0f, 448.0f, 0.0f, false};
template <>
inline constexpr Format kFormat<Float8E5M2>{-57344.0f, 57344.0f, 57344.0f, 0.0f, false};
template <>
inline constexpr Format kFormat<Int8>{-128.0f, 127.0f, 127.0f, 0.0f, true};
template <>
inline constexpr Format kFormat<Int4Pair>{0.0f, 15.0f, 7.0f, 8.0f, true};

// x, at most the largest number of the format, as a float of kMantissa bits after the point and an
// exponent bias of kBias; 0x7f for NaN.
template <int kMantissa, int kBias>
GQA_INLINE uint8_t to_float8(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = bits >> 24 & 0x80u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint8_t>(sign | 0x7fu);
  constexpr int kShift = 23 - kMantissa;
  constexpr uint32_t kMinNormal = static_cast<uint32_t>(127 + 1 - kBias) << 23;
  if (bits < kMinNormal) {
    // The sum with 2^(24 - kBias - kMantissa) rounds (to nearest even) at the step of subnormals.
    constexpr uint32_t kMagic = static_cast<uint32_t>(127 + 24 - kBias - kMantissa) << 23;
    float value, magic;
    std::memcpy(&value, &bits, sizeof value);
    std::memcpy(&magic, &kMagic, sizeof magic);
    value += magic;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<uint8_t>(sign | (bits - kMagic));
  }
  const uint32_t rebiased = bits - (static_cast<uint32_t>(127 - kBias) << 23);
  const uint32_t half = (1u << (kShift - 1)) - 1 + (bits >> kShift & 1u);
  return static_cast<uint8_t>(sign | ((rebiased + half) >> kShift));
}

GQA_INLINE void store_number(float x, Float8E4M3* out) { out->bits = to_float8<3, 7>(x); }
GQA_INLINE void store_number(float x, Float8E5M2* out) { out->bits = to_float8<2, 15>(x); }
GQA_INLINE void store_number(float x, Int8* out) { out->value = static_cast<int8_t>(x); }

// Scale and zero that fill the format's range with the row's, where 0 stays exact; NaN if any
// number is. zero: nullptr where none is kept, and the range is symmetric.
template <class S>
inline void find_scale(const float* x, int64_t n, float* scale, float* zero) {
  float low = 0.0f, high = 0.0f;
  bool nan = false;
  for (int64_t i = 0; i < n; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
    nan |= x[i] != x[i];
  }
  constexpr Format kF = kFormat<S>;
  const float range = zero == nullptr ? (high >= -low ? high : -low) : high - low;
  *scale = nan ? NAN : range / (zero == nullptr ? kF.symmetric_high : kF.high - kF.low);
  if (zero != nullptr) *zero = kF.low - (*scale > 0.0f ? std::nearbyint(low / *scale) : 0.0f);
}

// The stored number, still a float.
template <class S>
GQA_INLINE float quantize(float x, float scale, float zero) {
  constexpr Format kF = kFormat<S>;
  float stored = scale > 0.0f ? x / scale : 0.0f;
  if (kF.integer) {
    stored = std::nearbyint(stored);
    if (stored != stored) stored = 0.0f;  // a NaN has no integer; its row's scale is NaN
  }
  stored += zero;
  if (kF.integer && stored != stored) return kF.low;
  return stored < kF.low ? kF.low : stored > kF.high ? kF.high : stored;
}

template <class S>
inline void quantize_row(const float* x, int64_t n, float scale, float zero, S* out) {
  for (int64_t i = 0; i < n; ++i) store_number(quantize<S>(x[i], scale, zero), out + i);
}

inline void quantize_row(const float* x, int64_t n, float scale, float zero, Int4Pair* out) {
  for (int64_t i = 0; i < n; i += 2) {
    const int low = static_cast<int>(quantize<Int4Pair>(x[i], scale, zero));
    const int high = static_cast<int>(quantize<Int4Pair>(x[i + 1], scale, zero));
    out[i / 2].bits = static_cast<uint8_t>(low | high << 4);
  }
}

}  // namespace gqa::cpu::GQA_ISA
