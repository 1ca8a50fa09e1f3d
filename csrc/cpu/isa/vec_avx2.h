// Vectors of 8 floats: AVX2, FMA and F16C. The interface is described in vec_portable.h.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../../core/params.h"
#include "isa.h"
#include "scalars.h"

namespace gqa::cpu::GQA_ISA {

struct Vec {
  using F = __m256;
  using I = __m256i;  // 16 int16, or 8 sums of 32 bits
  using Mask = __m256;
  static constexpr int kWidth = 8;
  static constexpr int kSums = 12;  // that fit in registers together with their operands

  static GQA_INLINE F set1(float x) { return _mm256_set1_ps(x); }
  static GQA_INLINE F iota() { return _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7); }

  static GQA_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
  static GQA_INLINE F load(const BFloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static GQA_INLINE F load(const Float16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static GQA_INLINE F load(const Float8E4M3* p) {
    return _mm256_cvtph_ps(_mm256_castsi256_si128(halves(
        _mm256_castsi128_si256(_mm_cvtepi8_epi16(bytes8(p))), static_cast<Float8E4M3*>(nullptr))));
  }
  static GQA_INLINE F load(const Float8E5M2* p) {
    return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(bytes8(p)), 8));
  }
  static GQA_INLINE F load(const Int8* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes8(p)));
  }
  static GQA_INLINE F load(const Int4Pair* p) {
    int32_t bits;
    std::memcpy(&bits, p, sizeof bits);
    const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    const __m256i nibbles = _mm256_srlv_epi32(_mm256_set1_epi32(bits), shifts);
    return less_8(_mm256_and_si256(nibbles, _mm256_set1_epi32(15)));
  }

  template <class S>
  static constexpr bool kMasks = false;

  template <class S>
  static constexpr bool kDeinterleaves =
      std::is_same_v<S, BFloat16> || std::is_same_v<S, Int4Pair> || kBitShifted<S>;

  template <class S>
  static GQA_INLINE void load_block(const S* p, F& x0, F& x1) {
    x0 = load(p);
    x1 = load(p + kWidth);
  }
  static GQA_INLINE void load_block(const BFloat16* p, F& even, F& odd) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, high));
  }
  static GQA_INLINE void load_block(const Float8E4M3* p, F& x0, F& x1) {
    const __m256i x = halves(_mm256_cvtepi8_epi16(bytes16(p)), p);
    x0 = _mm256_cvtph_ps(_mm256_castsi256_si128(x));
    x1 = _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1));
  }
  static GQA_INLINE void load_block(const Float8E5M2* p, F& x0, F& x1) {
    const __m128i bits = bytes16(p), zero = _mm_setzero_si128();
    x0 = _mm256_cvtph_ps(_mm_unpacklo_epi8(zero, bits));
    x1 = _mm256_cvtph_ps(_mm_unpackhi_epi8(zero, bits));
  }
  static GQA_INLINE void load_block(const Int4Pair* p, F& even, F& odd) {
    const __m256i pairs = _mm256_cvtepu8_epi32(bytes8(p));
    even = less_8(_mm256_and_si256(pairs, _mm256_set1_epi32(15)));
    odd = less_8(_mm256_srli_epi32(pairs, 4));
  }
  template <class S>
  static GQA_INLINE void load_block(const BitShiftedFp8<S>* p, F& even, F& odd) {
    const __m256i pairs = _mm256_cvtepi8_epi16(bytes16(p));
    even = shifted<0>(pairs, p);
    odd = shifted<1>(pairs, p);
  }
  // Each part loads again, even if both could share a load.
  template <int kPart, class S>
  static GQA_INLINE F load_part(const S* p) {
    return load(p + kPart * kWidth);
  }
  template <int kPart>
  static GQA_INLINE F load_part(const BFloat16* p) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    return _mm256_castsi256_ps(kPart == 0 ? _mm256_slli_epi32(pairs, 16)
                                          : _mm256_and_si256(pairs, high));
  }
  template <int kPart>
  static GQA_INLINE F load_part(const Int4Pair* p) {
    const __m256i pairs = _mm256_cvtepu8_epi32(bytes8(p));
    return less_8(kPart == 0 ? _mm256_and_si256(pairs, _mm256_set1_epi32(15))
                             : _mm256_srli_epi32(pairs, 4));
  }
  template <int kPart, class S>
  static GQA_INLINE F load_part(const BitShiftedFp8<S>* p) {
    return shifted<kPart>(_mm256_cvtepi8_epi16(bytes16(p)), p);
  }
  static GQA_INLINE void deinterleave(F& x0, F& x1) {
    const F even = _mm256_shuffle_ps(x0, x1, 0x88), odd = _mm256_shuffle_ps(x0, x1, 0xdd);
    x0 = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(even), 0xd8));
    x1 = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(odd), 0xd8));
  }
  static GQA_INLINE void interleave(F& even, F& odd) {
    const F low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
    even = _mm256_permute2f128_ps(low, high, 0x20);
    odd = _mm256_permute2f128_ps(low, high, 0x31);
  }
  static GQA_INLINE void pin(F& x) { __asm__("" : "+x"(x)); }
  static GQA_INLINE void pin(I& x) { __asm__("" : "+x"(x)); }

  static constexpr bool kHasInt16 = true;
  static constexpr bool kSplitsQueries = false;
  static GQA_INLINE I zero_integers() { return _mm256_setzero_si256(); }
  static GQA_INLINE I load_int16(const int16_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static GQA_INLINE void load_int16(const Int8* p, I& x0, I& x1) {
    x0 = _mm256_cvtepi8_epi16(bytes16(p));
    x1 = _mm256_cvtepi8_epi16(bytes16(p + 16));
  }
  static GQA_INLINE void load_int16(const Int4Pair* p, I& even, I& odd) {
    nibbles(_mm256_cvtepu8_epi16(bytes16(p)), even, odd);
  }
  static GQA_INLINE void load_pairs(const Int8* a, const Int8* b, I& x0, I& x1) {
    const I row_a = _mm256_cvtepi8_epi16(bytes16(a)), row_b = _mm256_cvtepi8_epi16(bytes16(b));
    x0 = _mm256_unpacklo_epi16(row_a, row_b);  // 0 to 3 and 8 to 11; order_pairs corrects that
    x1 = _mm256_unpackhi_epi16(row_a, row_b);
  }
  static GQA_INLINE void load_pairs(const Int4Pair* a, const Int4Pair* b, I& even, I& odd) {
    nibbles(_mm256_cvtepu8_epi16(_mm_unpacklo_epi8(bytes8(a), bytes8(b))), even, odd);
  }
  template <class S>
  static GQA_INLINE void order_pairs(F& x0, F& x1) {
    if (!std::is_same_v<S, Int8>) return;
    const F low = x0, high = x1;
    x0 = _mm256_permute2f128_ps(low, high, 0x20);
    x1 = _mm256_permute2f128_ps(low, high, 0x31);
  }
  static GQA_INLINE I set_pair(const int16_t* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return _mm256_set1_epi32(pair);
  }
  static GQA_INLINE void add_products(I& sum, I a, I b) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
    pin(sum);  // else gcc adds up products first, and runs out of registers
  }
  static constexpr bool kShiftsFp8 = true;
  static GQA_INLINE void max_negative(I& most, const uint8_t* p) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    most = _mm256_max_epu8(most, _mm256_or_si256(x, _mm256_set1_epi8(-128)));
  }
  static GQA_INLINE bool any_byte_from(uint8_t limit, I x) {
    const I limits = _mm256_set1_epi8(static_cast<char>(limit));
    return _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_max_epu8(x, limits), x)) != 0;
  }
  static GQA_INLINE F to_float(I x) { return _mm256_cvtepi32_ps(x); }
  static GQA_INLINE void store_int16(int16_t* p, F x) {
    const __m256i integers = _mm256_cvtps_epi32(x);
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(p),
        _mm_packs_epi32(_mm256_castsi256_si128(integers), _mm256_extracti128_si256(integers, 1)));
  }

  static GQA_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static GQA_INLINE void store(BFloat16* p, F x) {
    const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(round_to(x, p)), 16);
    const __m256i packed = _mm256_packus_epi32(high, high);
    const __m256i ordered = _mm256_permute4x64_epi64(packed, 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(ordered));
  }
  static GQA_INLINE void store(Float16* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  static GQA_INLINE F round_to(F x, const float*) { return x; }
  static GQA_INLINE F round_to(F x, const BFloat16*) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i rounded = _mm256_and_si256(sum, _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
    const F nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
    return _mm256_blendv_ps(_mm256_castsi256_ps(rounded), nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  }
  static GQA_INLINE F round_to(F x, const Float16*) {
    return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }

  static GQA_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
  static GQA_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static GQA_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static GQA_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
  static GQA_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static GQA_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
  static GQA_INLINE F abs(F x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
  static GQA_INLINE F copy_sign(F magnitude, F sign) {
    return _mm256_or_ps(abs(magnitude), _mm256_and_ps(_mm256_set1_ps(-0.0f), sign));
  }

  static GQA_INLINE Mask less(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
  static GQA_INLINE Mask equal(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
  static GQA_INLINE Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }
  static GQA_INLINE F select(Mask mask, F a, F b) { return _mm256_blendv_ps(b, a, mask); }

  static GQA_INLINE F add_to_exponent(F x, F n_bits) {
    const __m256i shifted = _mm256_slli_epi32(_mm256_castps_si256(n_bits), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), shifted));
  }

  static GQA_INLINE float reduce_add(F x) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
  }
  static GQA_INLINE float reduce_max(F x) {
    __m128 most = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    most = _mm_max_ps(most, _mm_movehl_ps(most, most));
    return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
  }
  template <class X>
  static GQA_INLINE void store_sums4(float* out, const X (&x)[4]) {
    _mm_storeu_ps(out, sums4(x));
  }
  template <class X>
  static GQA_INLINE void store_sums2x2(float* a, float* b, const X (&x)[4]) {
    const __m128 sums = sums4(x);
    _mm_storel_pi(reinterpret_cast<__m64*>(a), sums);
    _mm_storeh_pi(reinterpret_cast<__m64*>(b), sums);
  }
  static GQA_INLINE void transpose(F (&x)[kWidth]) {
    F a[8], b[8];
    GQA_UNROLL(4)
    for (int i = 0; i < 8; i += 2) {
      a[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
      a[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
    GQA_UNROLL(2)
    for (int i = 0; i < 8; i += 4) {
      b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
      b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
      b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
      b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
    GQA_UNROLL(4)
    for (int i = 0; i < 4; ++i) {
      x[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
      x[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
  }

 private:
  // The halves of bytes, which are 16-bit numbers, less the default zero of int4.
  static GQA_INLINE void nibbles(I bytes, I& even, I& odd) {
    const I eight = _mm256_set1_epi16(8);
    even = _mm256_sub_epi16(_mm256_and_si256(bytes, _mm256_set1_epi16(15)), eight);
    odd = _mm256_sub_epi16(_mm256_srli_epi16(bytes, 4), eight);
  }
  static GQA_INLINE __m128 sums4(const F (&x)[4]) {
    // Each step adds halves of two vectors: lanes end as x0 x1 x2 x3 in both 128-bit halves.
    const F ab = add(_mm256_unpacklo_ps(x[0], x[1]), _mm256_unpackhi_ps(x[0], x[1]));
    const F cd = add(_mm256_unpacklo_ps(x[2], x[3]), _mm256_unpackhi_ps(x[2], x[3]));
    const F sums = add(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
    return _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
  }
  static GQA_INLINE __m128 sums4(const I (&x)[4]) {
    const I ab =
        _mm256_add_epi32(_mm256_unpacklo_epi32(x[0], x[1]), _mm256_unpackhi_epi32(x[0], x[1]));
    const I cd =
        _mm256_add_epi32(_mm256_unpacklo_epi32(x[2], x[3]), _mm256_unpackhi_epi32(x[2], x[3]));
    const I sums = _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
    return _mm_cvtepi32_ps(
        _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1)));
  }
  template <class S>
  static GQA_INLINE __m128i bytes8(const S* p) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  }
  template <class S>
  static GQA_INLINE __m128i bytes16(const S* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }
  static GQA_INLINE F less_8(__m256i x) {
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(x, _mm256_set1_epi32(8)));
  }
  // The even or odd ones of 16 sign-extended fp8 numbers: their bits shifted to where fp32 has the
  // sign, the last bits of the exponent, and the fraction.
  template <int kPart>
  static GQA_INLINE F shifted(__m256i pairs, const BitShiftedFp8<Float8E4M3>*) {
    const __m256i bits = _mm256_slli_epi32(pairs, kPart == 0 ? 20 : 4);
    return _mm256_castsi256_ps(
        _mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0x87f00000u))));
  }
  template <int kPart>
  static GQA_INLINE F shifted(__m256i pairs, const BitShiftedFp8<Float8E5M2>*) {
    const __m256i bits = _mm256_slli_epi32(pairs, kPart == 0 ? 21 : 5);
    return _mm256_castsi256_ps(
        _mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0x8fe00000u))));
  }
  // Sign-extended e4m3 to fp16 of 1/256 of the value: the exponents' biases differ by 8, and so
  // subnormals stay exact.
  static GQA_INLINE __m256i halves(__m256i x, const Float8E4M3*) {
    const __m256i ones = _mm256_set1_epi16(0x7f), bits = _mm256_and_si256(x, ones);
    const __m256i nan = _mm256_cmpeq_epi16(bits, ones);
    const __m256i shifted =
        _mm256_and_si256(_mm256_slli_epi16(x, 7), _mm256_set1_epi16(static_cast<short>(0xbf80)));
    return _mm256_or_si256(shifted, nan);
  }
};

}  // namespace gqa::cpu::GQA_ISA
