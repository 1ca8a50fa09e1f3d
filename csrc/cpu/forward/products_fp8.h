// Both products of direct tasks over fp8 K and V, on processors where subnormal operands cost
// nothing. Loads move the sign, exponent and fraction bits to their positions in fp32 and do not
// correct the exponent's bias (BitShiftedFp8), which takes fewer instructions than a conversion.
// The loaded numbers are 2^-120 (e4m3) or 2^-112 (e5m2) of the values, and may be subnormal. Their
// products must not be, so q and the scales of V are multiplied with powers of two first:
//
//   q * 2^64 . k * 2^-120           the rest, 2^56, is in the scales of K (dequantize.h)
//   p * scale * 2^64 * v * 2^-120   the rest is multiplied with o at the end
//
// That limits q and the scales of V to 2^63. NaN and infinities load as finite numbers; a separate
// search finds them and corrects the sums.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../isa/isa.h"
#include "../isa/scalars.h"
#include "dequantize.h"
#include "products_direct.h"
#include "tile.h"

namespace gqa::cpu::GQA_ISA {

template <class V, class S>
class Fp8Products : public DirectProducts<V, BitShiftedFp8<S>> {
  using Products = DirectProducts<V, BitShiftedFp8<S>>;

 public:
  using Products::Products;

  void begin(int rows) {
    const int64_t ld = this->tile_.layout.q_ld;
    scale(this->tile_.q, rows * ld, kPart.all / kPart.k_scale);
    Products::begin(rows);
  }

  void end(int rows) {
    scale(this->tile_.o, rows * this->tile_.layout.o_ld, kPart.all / kPart.v_scale);
    Products::end(rows);
  }

  void scores(int begin, int rows, const StripKeys* strips) {
    Products::scores(begin, rows, strips);
    const TileLayout<V>& layout = this->tile_.layout;
    add_specials(this->k_rows_, strips[0], this->head_dim_, [&](int key, int64_t place, float x) {
      for (int r = 0; r < rows; ++r) {
        this->tile_.s[r * layout.keys + key] += this->tile_.q[r * layout.q_ld + place] * x;
      }
    });
  }

  void accumulate(int begin, int rows, const StripKeys* strips) {
    Products::accumulate(begin, rows, strips);
    const TileLayout<V>& layout = this->tile_.layout;
    add_specials(
        this->v_rows_, strips[0], this->value_head_dim_, [&](int key, int64_t place, float x) {
          for (int r = 0; r < rows; ++r) {
            this->tile_.o[r * layout.o_ld + place] += this->tile_.s[r * layout.keys + key] * x;
          }
        });
  }

 private:
  static constexpr int kW = V::kWidth;
  static constexpr LoadedPart kPart = kLoadedPart<BitShiftedFp8<S>>;

  static void scale(float* x, int64_t n, float factor) {
    for (int64_t i = 0; i < n; i += kW) {
      V::store(x + i, V::mul(V::load(x + i), V::set1(factor)));
    }
  }

  // Calls add(key, index of d in a deinterleaved row, number d of the key's row) for NaN and
  // infinities.
  template <class Add>
  void add_specials(const BitShiftedFp8<S>* const* rows, StripKeys keys, int64_t dims,
                    Add add) const {
    if (!any_special(rows, keys, dims)) return;
    for (int key = keys.begin; key < keys.end; ++key) {
      for (int64_t d = 0; d < dims; ++d) {
        const float x = to_float(S{rows[key][d].bits});
        const int64_t in_block = d % (2 * kW);
        if (!std::isfinite(x)) add(key, d - in_block + in_block % 2 * kW + in_block / 2, x);
      }
    }
  }

  static GQA_NOINLINE bool any_special(const BitShiftedFp8<S>* const* rows, StripKeys keys,
                                       int64_t dims) {
    return dims == kCommonHeadDim ? find_special<kCommonHeadDim>(rows, keys, kCommonHeadDim)
                                  : find_special<0>(rows, keys, dims);
  }
  // kDims: dims, or 0 for any.
  template <int kDims>
  static GQA_INLINE bool find_special(const BitShiftedFp8<S>* const* rows, StripKeys keys,
                                      int64_t dims) {
    constexpr int kBytes = 4 * kW;
    constexpr uint8_t kLeast = std::is_same_v<S, Float8E4M3> ? 0xff : 0xfc;  // with the sign's bit
    typename V::I most = V::zero_integers();
    for (int key = keys.begin; key < keys.end; ++key) {
      const uint8_t* row = reinterpret_cast<const uint8_t*>(rows[key]);
      const int64_t n = kDims ? kDims : dims;
      int64_t d = 0;
      GQA_UNROLL(4)
      for (; d + kBytes <= n; d += kBytes) V::max_negative(most, row + d);
      if (d < n) {
        uint8_t rest[kBytes] = {};
        std::memcpy(rest, row + d, n - d);
        V::max_negative(most, rest);
      }
    }
    return V::any_byte_from(kLeast, most);
  }
};

}  // namespace gqa::cpu::GQA_ISA
