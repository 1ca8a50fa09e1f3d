// The functions of emulated_avx512.h on 16-bit integers and on bytes.
#pragma once

#include "emulated_avx512.h"

namespace gqa::cpu::GQA_ISA {

inline __m512i _mm512_set1_epi16(int16_t value) {
  emulated::Uint16x32 x;
  for (uint16_t& lane : x.x) lane = static_cast<uint16_t>(value);
  return x.vector();
}
inline __m512i _mm512_sub_epi16(__m512i a, __m512i b) {
  emulated::Uint16x32 x(a);
  const emulated::Uint16x32 y(b);
  for (int i = 0; i < 32; ++i) x.x[i] = static_cast<uint16_t>(x.x[i] - y.x[i]);
  return x.vector();
}
inline __m512i _mm512_srli_epi16(__m512i a, unsigned n) {
  emulated::Uint16x32 x(a);
  for (uint16_t& lane : x.x) lane = static_cast<uint16_t>(lane >> n);
  return x.vector();
}
inline __m512i _mm512_madd_epi16(__m512i a, __m512i b) {  // sums of two products wrap around
  const emulated::Uint16x32 x(a), y(b);
  const auto product = [&](int i) {
    return static_cast<uint32_t>(static_cast<int16_t>(x.x[i]) * static_cast<int16_t>(y.x[i]));
  };
  __m512i sums;
  for (int i = 0; i < 16; ++i) sums[i] = product(2 * i) + product(2 * i + 1);
  return sums;
}

inline __m512i _mm512_cvtepu8_epi16(__m256i x) {
  const emulated::Bytes32 bytes(x);
  emulated::Uint16x32 wide;
  for (int i = 0; i < 32; ++i) wide.x[i] = bytes.x[i];
  return wide.vector();
}
inline __m512i _mm512_cvtepi8_epi16(__m256i x) {
  const emulated::Bytes32 bytes(x);
  emulated::Uint16x32 wide;
  for (int i = 0; i < 32; ++i) {
    wide.x[i] = static_cast<uint16_t>(static_cast<int16_t>(static_cast<int8_t>(bytes.x[i])));
  }
  return wide.vector();
}
inline __m512i _mm512_cvtps_epi32(__m512 x) {  // to nearest even; 0x80000000 where it doesn't fit
  __m512i whole;
  for (int i = 0; i < 16; ++i) {
    const float rounded = std::nearbyint(x[i]);
    const bool fits = rounded >= -0x1p31f && rounded < 0x1p31f;
    whole[i] = fits ? static_cast<uint32_t>(static_cast<int32_t>(rounded)) : 0x80000000u;
  }
  return whole;
}
inline __m256i _mm512_cvtsepi32_epi16(__m512i x) {  // saturates
  emulated::Uint16x16 low;
  for (int i = 0; i < 16; ++i) {
    const int32_t wide = static_cast<int32_t>(x[i]);
    const int32_t narrow = wide < -32768 ? -32768 : wide > 32767 ? 32767 : wide;
    low.x[i] = static_cast<uint16_t>(narrow);
  }
  return low.vector();
}

inline __m128i unpack_bytes(__m128i a, __m128i b, int first) {
  const emulated::Bytes16 x(a), y(b);
  emulated::Bytes16 z;
  for (int i = 0; i < 16; ++i) z.x[i] = (i & 1 ? y : x).x[first + i / 2];
  return z.vector();
}
inline __m128i _mm_unpacklo_epi8(__m128i a, __m128i b) { return unpack_bytes(a, b, 0); }
inline __m128i _mm_unpackhi_epi8(__m128i a, __m128i b) { return unpack_bytes(a, b, 8); }
inline __m256i _mm256_castsi128_si256(__m128i x) {
  return __m256i{x[0], x[1], x[2], x[3], 0, 0, 0, 0};
}
inline __m256i _mm256_inserti128_si256(__m256i x, __m128i half, int which) {
  for (int i = 0; i < 4; ++i) x[which * 4 + i] = half[i];
  return x;
}

}  // namespace gqa::cpu::GQA_ISA
