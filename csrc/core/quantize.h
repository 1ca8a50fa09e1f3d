// Quantisation: value = (stored - zero) * scale. gqa_kernels/cache/formats.py defines it, bit for
// bit: true divisions, rounding to nearest even, saturation. The appends of all devices use this
// file.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_device.h"
#include "params.h"

namespace gqa {

struct Format {
  float low, high;       // smallest and largest stored number
  float symmetric_high;  // stored value of a row's largest magnitude if the format keeps no zeros
  float default_zero;
  bool integer;
};

template <class S>
GQA_HOST_DEVICE constexpr Format format_of();
template <>
GQA_HOST_DEVICE constexpr Format format_of<Float8E4M3>() {
  return {-448.0f, 448.0f, 448.0f, 0.0f, false};
}
template <>
GQA_HOST_DEVICE constexpr Format format_of<Float8E5M2>() {
  return {-57344.0f, 57344.0f, 57344.0f, 0.0f, false};
}
template <>
GQA_HOST_DEVICE constexpr Format format_of<Int8>() {
  return {-128.0f, 127.0f, 127.0f, 0.0f, true};
}
template <>
GQA_HOST_DEVICE constexpr Format format_of<Int4Pair>() {
  return {0.0f, 15.0f, 7.0f, 8.0f, true};
}

// Rounds x, which is at most the format's largest number, to a float with kMantissa bits of
// fraction and an exponent bias of kBias, and returns its bits; 0x7f for NaN.
template <int kMantissa, int kBias>
GQA_HOST_DEVICE inline uint8_t to_float8(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = bits >> 24 & 0x80u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint8_t>(sign | 0x7fu);
  constexpr int kShift = 23 - kMantissa;
  constexpr uint32_t kMinNormal = static_cast<uint32_t>(127 + 1 - kBias) << 23;
  if (bits < kMinNormal) {
    // Adding 2^(24 - kBias - kMantissa) rounds to the step of subnormals, to nearest even.
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

// The bits of a stored number, given as a float: a byte, or half a byte for kInt4.
template <class S>
GQA_HOST_DEVICE inline uint8_t stored_bits(float x);
template <>
GQA_HOST_DEVICE inline uint8_t stored_bits<Float8E4M3>(float x) {
  return to_float8<3, 7>(x);
}
template <>
GQA_HOST_DEVICE inline uint8_t stored_bits<Float8E5M2>(float x) {
  return to_float8<2, 15>(x);
}
template <>
GQA_HOST_DEVICE inline uint8_t stored_bits<Int8>(float x) {
  return static_cast<uint8_t>(static_cast<int8_t>(x));
}
template <>
GQA_HOST_DEVICE inline uint8_t stored_bits<Int4Pair>(float x) {
  return static_cast<uint8_t>(x);
}

// The range of a row, from which its scale and zero follow. It includes 0, so that 0 is stored
// exactly.
struct RowRange {
  float low = 0.0f, high = 0.0f;
  bool nan = false;

  GQA_HOST_DEVICE inline void include(float x) {
    low = x < low ? x : low;
    high = x > high ? x : high;
    nan |= x != x;
  }
};

struct RowScale {
  float scale, zero;
};

// The scale and zero that map the row's range to the format's; NaN if any number is NaN. If the
// format keeps no zero, the range is symmetric.
template <class S>
GQA_HOST_DEVICE inline RowScale row_scale(const RowRange& row, bool keeps_zero) {
  constexpr Format kF = format_of<S>();
  const float magnitude = row.high >= -row.low ? row.high : -row.low;
  const float range = keeps_zero ? row.high - row.low : magnitude;
  const float scale = row.nan ? NAN : range / (keeps_zero ? kF.high - kF.low : kF.symmetric_high);
  if (!keeps_zero) return {scale, kF.default_zero};
  return {scale, kF.low - (scale > 0.0f ? nearbyintf(row.low / scale) : 0.0f)};
}

// The stored number, as a float.
template <class S>
GQA_HOST_DEVICE inline float quantize(float x, const RowScale& row) {
  constexpr Format kF = format_of<S>();
  float stored = row.scale > 0.0f ? x / row.scale : 0.0f;
  if (kF.integer) {
    stored = nearbyintf(stored);
    if (stored != stored) stored = 0.0f;  // an integer can't be NaN; the row's scale is NaN
  }
  stored += row.zero;
  if (kF.integer && stored != stored) return kF.low;
  return stored < kF.low ? kF.low : stored > kF.high ? kF.high : stored;
}

}  // namespace gqa
