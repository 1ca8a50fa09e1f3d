// Vectors of 16 floats: AVX-512 F, BW, DQ and VL, and BF16 if GQA_VEC_BF16 is defined. The
// interface is described in vec_portable.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../../core/params.h"
#include "intrinsics_avx512.h"
#include "isa.h"

namespace gqa::cpu::GQA_ISA {

struct Vec {
  using F = __m512;
  using I = __m512i;  // 32 int16, or 16 sums of 32 bits
  using Mask = __mmask16;
  static constexpr int kWidth = 16;
  static constexpr int kSums = 24;  // that fit in registers together with their operands

  static GQA_INLINE F set1(float x) { return _mm512_set1_ps(x); }
  static GQA_INLINE F iota() {
    return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }

  static GQA_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
  static GQA_INLINE F load(const BFloat16* p) { return widen(bytes32(p), p); }
  static GQA_INLINE F load(const Float16* p) { return widen(bytes32(p), p); }
  static GQA_INLINE F load(const Float8E4M3* p) {
    // Sign-extended e4m3 to fp16 of 1/256 of the value: the exponents' biases differ by 8, and so
    // subnormals stay exact. NaN keeps all its magnitude's bits.
    const __m256i x = _mm256_cvtepi8_epi16(bytes16(p));
    const __m256i shifted = _mm256_and_si256(_mm256_slli_epi16(x, 7), _mm256_set1_epi16(-0x4080));
    const __m256i ones = _mm256_set1_epi16(0x7f);
    const __mmask16 nan = _mm256_cmpeq_epi16_mask(_mm256_and_si256(x, ones), ones);
    return _mm512_cvtph_ps(_mm256_mask_blend_epi16(nan, shifted, _mm256_set1_epi16(0x7e00)));
  }
  static GQA_INLINE F load(const Float8E5M2* p) {
    return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes16(p)), 8));
  }
  static GQA_INLINE F load(const Int8* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes16(p)));
  }
  static GQA_INLINE F load(const Int4Pair* p) {
    const __m128i pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const __m128i nibble = _mm_set1_epi8(15);
    const __m128i low = _mm_and_si128(pairs, nibble);
    const __m128i high = _mm_and_si128(_mm_srli_epi16(pairs, 4), nibble);
    return less_8(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(low, high)));
  }

  template <class S>
  static constexpr bool kMasks =
      std::is_same_v<S, float> || std::is_same_v<S, BFloat16> || std::is_same_v<S, Float16>;
  static GQA_INLINE F load_first(const float* p, int64_t n) {
    return _mm512_maskz_loadu_ps(first16(n), p);
  }
  template <class S>
  static GQA_INLINE F load_first(const S* p, int64_t n) {
    return widen(_mm256_maskz_loadu_epi16(first16(n), p), p);
  }

  template <class S>
  static constexpr bool kDeinterleaves = std::is_same_v<S, BFloat16> || std::is_same_v<S, Int4Pair>;

  template <class S>
  static GQA_INLINE void load_block(const S* p, F& x0, F& x1) {
    x0 = load(p);
    x1 = load(p + kWidth);
  }
  static GQA_INLINE void load_block(const BFloat16* p, F& even, F& odd) {
    split_pairs(_mm512_loadu_si512(p), even, odd);
  }
  static GQA_INLINE void load_block(const Int4Pair* p, F& even, F& odd) {
    const __m512i pairs = _mm512_cvtepu8_epi32(bytes16(p));
    even = less_8(_mm512_and_si512(pairs, _mm512_set1_epi32(15)));
    odd = less_8(_mm512_srli_epi32(pairs, 4));
  }
  template <int kPart, class S>
  static GQA_INLINE F load_part(const S* p) {
    return load(p + kPart * kWidth);
  }
  template <int kPart>
  static GQA_INLINE F load_part(const BFloat16* p) {
    F even, odd;
    split_pairs(_mm512_loadu_si512(p), even, odd);
    return kPart == 0 ? even : odd;
  }
  template <int kPart>
  static GQA_INLINE F load_part(const Int4Pair* p) {
    F even, odd;
    load_block(p, even, odd);
    return kPart == 0 ? even : odd;
  }
  template <class S>
  static GQA_INLINE void load_block_first(const S* p, int64_t n, F& x0, F& x1) {
    x0 = load_first(p, n < kWidth ? n : kWidth);
    x1 = n > kWidth ? load_first(p + kWidth, n - kWidth) : _mm512_setzero_ps();
  }
  static GQA_INLINE void load_block_first(const BFloat16* p, int64_t n, F& even, F& odd) {
    split_pairs(_mm512_maskz_loadu_epi16(first32(n), p), even, odd);
  }
  static GQA_INLINE void deinterleave(F& x0, F& x1) {
    const F a = x0, b = x1;
    x0 = _mm512_permutex2var_ps(a, every_second(0), b);
    x1 = _mm512_permutex2var_ps(a, every_second(1), b);
  }
  static GQA_INLINE void interleave(F& even, F& odd) {
    const F low = _mm512_unpacklo_ps(even, odd), high = _mm512_unpackhi_ps(even, odd);
    even = _mm512_permutex2var_ps(low, quarters(0), high);
    odd = _mm512_permutex2var_ps(low, quarters(8), high);
  }
  static GQA_INLINE void pin(F& x) { GQA_PIN(x); }
  static GQA_INLINE void pin(I& x) { GQA_PIN(x); }

  static constexpr bool kShiftsFp8 = false;
  static constexpr bool kHasInt16 = true;
  static constexpr bool kSplitsQueries = false;
  static GQA_INLINE I zero_integers() { return _mm512_setzero_si512(); }
  static GQA_INLINE I load_int16(const int16_t* p) { return _mm512_loadu_si512(p); }
  static GQA_INLINE void load_int16(const Int8* p, I& x0, I& x1) {
    x0 = _mm512_cvtepi8_epi16(bytes32(p));
    x1 = _mm512_cvtepi8_epi16(bytes32(p + 32));
  }
  static GQA_INLINE void load_int16(const Int4Pair* p, I& even, I& odd) {
    nibbles(_mm512_cvtepu8_epi16(bytes32(p)), even, odd);
  }
  static GQA_INLINE void load_pairs(const Int8* a, const Int8* b, I& x0, I& x1) {
    x0 = _mm512_cvtepi8_epi16(interleave_bytes(bytes16(a), bytes16(b)));
    x1 = _mm512_cvtepi8_epi16(interleave_bytes(bytes16(a + 16), bytes16(b + 16)));
  }
  static GQA_INLINE void load_pairs(const Int4Pair* a, const Int4Pair* b, I& even, I& odd) {
    nibbles(_mm512_cvtepu8_epi16(interleave_bytes(bytes16(a), bytes16(b))), even, odd);
  }
  template <class S>
  static GQA_INLINE void order_pairs(F&, F&) {}
  static GQA_INLINE I set_pair(const int16_t* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return _mm512_set1_epi32(pair);
  }
  static GQA_INLINE void add_products(I& sum, I a, I b) {
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
    pin(sum);  // else gcc adds up products first, and runs out of registers
  }
  static GQA_INLINE F to_float(I x) { return _mm512_cvtepi32_ps(x); }
  static GQA_INLINE void store_int16(int16_t* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x)));
  }

  static GQA_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
#if defined(GQA_VEC_BF16)
  // For products_halves.h: 32 numbers, or 16 pairs. vdpbf16ps takes subnormal numbers for 0.
  using Halves = __m512i;
  using Weights = __m512i;  // the same pair in all lanes
  static GQA_INLINE Halves load_halves(const BFloat16* p) { return _mm512_loadu_si512(p); }
  static GQA_INLINE void add_products(F& sum, Halves x, Halves y) {
    sum = _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y);
  }
  static GQA_INLINE Weights load_weights(const BFloat16* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return _mm512_set1_epi32(pair);
  }
  // Unpacking works within quarters of a vector: pairs.h says which columns are where.
  static GQA_INLINE void load_columns(const BFloat16* a, const BFloat16* b, Halves& x0,
                                      Halves& x1) {
    const __m512i row_a = _mm512_loadu_si512(a), row_b = _mm512_loadu_si512(b);
    x0 = _mm512_unpacklo_epi16(row_a, row_b);
    x1 = _mm512_unpackhi_epi16(row_a, row_b);
  }
  static GQA_INLINE void add_columns(F& sum0, F& sum1, Weights w, Halves x0, Halves x1) {
    add_products(sum0, w, x0);
    add_products(sum1, w, x1);
  }
  static GQA_INLINE void order_columns(float* columns) {
    const F left = load(columns), right = load(columns + kWidth);
    store(columns, _mm512_permutex2var_ps(left, quarters(0), right));
    store(columns + kWidth, _mm512_permutex2var_ps(left, quarters(8), right));
  }
  // Subnormal numbers become 0.
  static GQA_INLINE void store(BFloat16* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
  }
#else
  static GQA_INLINE void store(BFloat16* p, F x) {
    const __m512i high = _mm512_srli_epi32(_mm512_castps_si512(round_to(x, p)), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(high));
  }
#endif
  static GQA_INLINE void store(Float16* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  static GQA_INLINE F round_to(F x, const float*) { return x; }
  static GQA_INLINE F round_to(F x, const BFloat16*) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i rounded = _mm512_and_si512(sum, _mm512_set1_epi32(-0x10000));
    const F nan = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000));
    return select(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), nan, _mm512_castsi512_ps(rounded));
  }
  static GQA_INLINE F round_to(F x, const Float16*) {
    return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }

  static GQA_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
  static GQA_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static GQA_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static GQA_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
  static GQA_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static GQA_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
  static GQA_INLINE F abs(F x) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), x); }
  static GQA_INLINE F copy_sign(F magnitude, F sign) {
    return _mm512_or_ps(abs(magnitude), _mm512_and_ps(_mm512_set1_ps(-0.0f), sign));
  }

  static GQA_INLINE Mask less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static GQA_INLINE Mask equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  static GQA_INLINE Mask both(Mask a, Mask b) { return static_cast<Mask>(a & b); }
  static GQA_INLINE F select(Mask mask, F a, F b) { return _mm512_mask_blend_ps(mask, b, a); }

  static GQA_INLINE F add_to_exponent(F x, F n_bits) {
    const __m512i shifted = _mm512_slli_epi32(_mm512_castps_si512(n_bits), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), shifted));
  }

  static GQA_INLINE float reduce_add(F x) { return _mm512_reduce_add_ps(x); }
  static GQA_INLINE float reduce_max(F x) { return _mm512_reduce_max_ps(x); }
  static GQA_INLINE void store_sums4(float* out, const F (&x)[4]) { _mm_storeu_ps(out, sums4(x)); }
  static GQA_INLINE void store_sums2x2(float* a, float* b, const F (&x)[4]) {
    float sums[4];
    _mm_storeu_ps(sums, sums4(x));
    std::memcpy(a, sums, 2 * sizeof(float));
    std::memcpy(b, sums + 2, 2 * sizeof(float));
  }
  static GQA_INLINE void store_sums4(float* out, const I (&x)[4]) {
    const F sums[4] = {to_float(x[0]), to_float(x[1]), to_float(x[2]), to_float(x[3])};
    store_sums4(out, sums);
  }
  static GQA_INLINE void store_sums2x2(float* a, float* b, const I (&x)[4]) {
    const F sums[4] = {to_float(x[0]), to_float(x[1]), to_float(x[2]), to_float(x[3])};
    store_sums2x2(a, b, sums);
  }
  // Four rounds; each doubles the length of the runs of lanes that are in their final position.
  static GQA_INLINE void transpose(F (&x)[kWidth]) {
    F a[16], b[16];
    GQA_UNROLL(8)
    for (int i = 0; i < 16; i += 2) {
      a[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
      a[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    GQA_UNROLL(4)
    for (int i = 0; i < 16; i += 4) {
      b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
      b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
      b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
      b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
    GQA_UNROLL(2)
    for (int i = 0; i < 16; i += 8) {
      GQA_UNROLL(4)
      for (int j = i; j < i + 4; ++j) {
        a[j] = _mm512_shuffle_f32x4(b[j], b[j + 4], 0x88);
        a[j + 4] = _mm512_shuffle_f32x4(b[j], b[j + 4], 0xdd);
      }
    }
    GQA_UNROLL(8)
    for (int i = 0; i < 8; ++i) {
      x[i] = _mm512_shuffle_f32x4(a[i], a[i + 8], 0x88);
      x[i + 8] = _mm512_shuffle_f32x4(a[i], a[i + 8], 0xdd);
    }
  }

 private:
  static GQA_INLINE __m128 sums4(const F (&x)[4]) {
    // Each step adds halves of two vectors: lanes end as x0 x1 x2 x3 in all 128-bit quarters.
    const F ab = add(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    const F cd = add(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    const F sums = add(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m128 low = _mm_add_ps(_mm512_castps512_ps128(sums), _mm512_extractf32x4_ps(sums, 1));
    return _mm_add_ps(low,
                      _mm_add_ps(_mm512_extractf32x4_ps(sums, 2), _mm512_extractf32x4_ps(sums, 3)));
  }
  template <class S>
  static GQA_INLINE __m128i bytes16(const S* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }
  template <class S>
  static GQA_INLINE __m256i bytes32(const S* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static GQA_INLINE F widen(__m256i bits, const BFloat16*) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static GQA_INLINE F widen(__m256i bits, const Float16*) { return _mm512_cvtph_ps(bits); }
  static GQA_INLINE void split_pairs(__m512i pairs, F& even, F& odd) {
    even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-0x10000)));
  }
  // a[0] b[0] a[1] b[1] ...
  static GQA_INLINE __m256i interleave_bytes(__m128i a, __m128i b) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi8(a, b)),
                                   _mm_unpackhi_epi8(a, b), 1);
  }
  // The halves of bytes, which are 16-bit numbers, less the default zero of int4.
  static GQA_INLINE void nibbles(I bytes, I& even, I& odd) {
    const I eight = _mm512_set1_epi16(8);
    even = _mm512_sub_epi16(_mm512_and_si512(bytes, _mm512_set1_epi16(15)), eight);
    odd = _mm512_sub_epi16(_mm512_srli_epi16(bytes, 4), eight);
  }
  static GQA_INLINE F less_8(__m512i x) {
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(x, _mm512_set1_epi32(8)));
  }
  static GQA_INLINE __mmask16 first16(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
  static GQA_INLINE __mmask32 first32(int64_t n) { return (1u << n) - 1; }
  // Lanes of two vectors, the second one's from 16 on: those from `first` in steps of 2.
  static GQA_INLINE __m512i every_second(int first) {
    return _mm512_add_epi32(
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
        _mm512_set1_epi32(first));
  }
  // Alternating quarters of both, from lane `first` on.
  static GQA_INLINE __m512i quarters(int first) {
    return _mm512_add_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23),
        _mm512_set1_epi32(first));
  }
};

}  // namespace gqa::cpu::GQA_ISA
