// Converts stored numbers of K and V, in the 16-bit units that ldmatrix moves, to operands of mma.
// This file alone knows the bits of the quantised formats.
//
// Every quantised number is exact in fp16, which has more bits than any of them, and the exponents
// of fp8 e5m2. So kernels over quantised caches multiply in fp16, whatever q's type.
#pragma once

#include <cstdint>

#include "../../core/params.h"

namespace gqa::cuda {

__device__ __forceinline__ uint32_t subtract_f16x2(uint32_t x, uint32_t y) {
  uint32_t r;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(x), "r"(y));
  return r;
}

// Of type S:
//   kPerUnit  numbers in 16 bits
//   kPart     pairs hold 1 / kPart of a number,
//   kZero     less this: the zero of the format where none is given
//   pairs     of a word, two units: pair i is number i of the low unit and number i of the high one
template <class S>
struct StoredNumbers {
  static constexpr int kPerUnit = 1;
  static constexpr float kPart = 1.0f, kZero = 0.0f;
  static __device__ __forceinline__ void pairs(uint32_t word, uint32_t (&x)[1]) { x[0] = word; }
};

template <>
struct StoredNumbers<Float8E5M2> {
  static constexpr int kPerUnit = 2;
  static constexpr float kPart = 1.0f, kZero = 0.0f;
  static __device__ __forceinline__ void pairs(uint32_t word, uint32_t (&x)[2]) {
    x[0] = __byte_perm(word, 0, 0x2404);  // fp16 of as many exponent bits: a byte and zeros
    x[1] = word & 0xff00ff00u;
  }
};

template <>
struct StoredNumbers<Float8E4M3> {
  static constexpr int kPerUnit = 2;
  static constexpr float kPart = 256.0f, kZero = 0.0f;  // the bias of fp16 is 15, of e4m3 7
  static __device__ __forceinline__ void pairs(uint32_t word, uint32_t (&x)[2]) {
    x[0] = widen(word << 8);
    x[1] = widen(word);
  }
  // The high byte of each half. Subnormals become subnormals of fp16, which are as they should be.
  static __device__ __forceinline__ uint32_t widen(uint32_t word) {
    const uint32_t magnitude = word >> 1 & 0x3f803f80u;
    // Adding one in the last place carries into the highest exponent bit for NaN alone, all ones;
    // with that bit the exponent is all ones too.
    const uint32_t nan = (magnitude + 0x00800080u) & 0x40004000u;
    return (word & 0x80008000u) | magnitude | nan;
  }
};

template <>
struct StoredNumbers<Int8> {
  static constexpr int kPerUnit = 2;
  static constexpr float kPart = 1.0f, kZero = 0.0f;
  static __device__ __forceinline__ void pairs(uint32_t word, uint32_t (&x)[2]) {
    // The low bits of a number from 1024 to 2047 in fp16 are the integer above 1024.
    constexpr uint32_t k1024 = 0x64646464u, k1152 = 0x64806480u;
    const uint32_t unsigned_bytes = word ^ 0x80808080u;  // plus 128
    x[0] = subtract_f16x2(__byte_perm(unsigned_bytes, k1024, 0x4240), k1152);
    x[1] = subtract_f16x2(__byte_perm(unsigned_bytes, k1024, 0x4341), k1152);
  }
};

template <>
struct StoredNumbers<Int4Pair> {
  static constexpr int kPerUnit = 4;
  static constexpr float kPart = 1.0f, kZero = 8.0f;
  static __device__ __forceinline__ void pairs(uint32_t word, uint32_t (&x)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[i] = subtract_f16x2((word >> 4 * i & 0x000f000fu) | 0x64006400u, 0x64086408u);  // - 1032
    }
  }
};

}  // namespace gqa::cuda
