// Numbers to stored numbers: value = (stored - zero) * scale. Defined by
// gqa_kernels/cache/formats.py, bit for bit: true divisions, rounding to nearest even,
// saturation. For the appends of all devices.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_device.h"
#include "params.h"

namespace gqa {

struct Format {
  float low, high;       // smallest and largest stored number
  float symmetric_high;  // what a row's largest magnitude becomes where no zeros are kept
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

// x, at most the largest number of the format, as a float of kMantissa bits after the point and an
// exponent bias of kBias; 0x7f for NaN.
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

// A stored number, still a float, as it lies in a byte (of kInt4: in half of one).
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

// What a row's scale and zero are found from. It holds 0, so that 0 stays exact.
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

// Scale and zero that fill the format's range with the row's; NaN if any number is. Where no zero
// is kept, the range is symmetric.
template <class S>
GQA_HOST_DEVICE inline RowScale row_scale(const RowRange& row, bool keeps_zero) {
  constexpr Format kF = format_of<S>();
  const float magnitude = row.high >= -row.low ? row.high : -row.low;
  const float range = keeps_zero ? row.high - row.low : magnitude;
  const float scale = row.nan ? NAN : range / (keeps_zero ? kF.high - kF.low : kF.symmetric_high);
  if (!keeps_zero) return {scale, kF.default_zero};
  return {scale, kF.low - (scale > 0.0f ? nearbyintf(row.low / scale) : 0.0f)};
}

// The stored number, still a float.
template <class S>
GQA_HOST_DEVICE inline float quantize(float x, const RowScale& row) {
  constexpr Format kF = format_of<S>();
  float stored = row.scale > 0.0f ? x / row.scale : 0.0f;
  if (kF.integer) {
    stored = nearbyintf(stored);
    if (stored != stored) stored = 0.0f;  // a NaN has no integer; its row's scale is NaN
  }
  stored += row.zero;
  if (kF.integer && stored != stored) return kF.low;
  return stored < kF.low ? kF.low : stored > kF.high ? kF.high : stored;
}

}  // namespace gqa
