// The 16-lane vectors on emulated instructions against one number at a time, and the dot-product
// instructions on operands that tell their roundings apart.
#define GQA_ISA avx512
#define GQA_VEC_BF16
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "core/params.h"
#include "cpu/forward/pairs.h"
#include "cpu/isa/math.h"
#include "cpu/isa/scalars.h"
#include "cpu/isa/vec_avx512.h"

namespace {

using namespace gqa;
using namespace gqa::cpu::avx512;

int failures = 0;

void expect(bool ok, const char* what, double got, double expected) {
  if (ok) return;
  ++failures;
  if (failures < 20) std::printf("FAILED %s: got %.9g, expected %.9g\n", what, got, expected);
}

void expect_lanes(const char* what, Vec::F got, const float* expected) {
  for (int i = 0; i < 16; ++i) {
    const bool nan = std::isnan(expected[i]);
    expect(nan ? std::isnan(got[i]) : got[i] == expected[i], what, got[i], expected[i]);
  }
}

// A block's vectors one by one.
template <class S>
void expect_parts(const char* what, const S* numbers, const float* expected) {
  Vec::F x0 = Vec::load_part<0>(numbers), x1 = Vec::load_part<1>(numbers);
  if (Vec::kDeinterleaves<S>) Vec::interleave(x0, x1);
  expect_lanes(what, x0, expected);
  expect_lanes(what, x1, expected + 16);
}

// Every bit pattern of a type, in order and as blocks, whole and cut off.
template <class S, class Word>
void test_loads(const char* what, uint32_t patterns) {
  for (uint32_t first = 0; first < patterns; first += 32) {
    S numbers[32];
    float expected[32];
    for (uint32_t i = 0; i < 32; ++i) {
      const Word bits = static_cast<Word>(first + i);
      std::memcpy(&numbers[i], &bits, sizeof bits);
      expected[i] = to_float(numbers[i]);
    }
    expect_lanes(what, Vec::load(numbers), expected);
    Vec::F x0, x1;
    Vec::load_block(numbers, x0, x1);
    if (Vec::kDeinterleaves<S>) Vec::interleave(x0, x1);
    expect_lanes(what, x0, expected);
    expect_lanes(what, x1, expected + 16);
    expect_parts(what, numbers, expected);
    if constexpr (Vec::kMasks<S>) {
      const int n = static_cast<int>(first / 32 % 31 + 1);
      // Nothing lies behind the numbers, for sanitizers to see.
      S* heap = static_cast<S*>(std::malloc(n * sizeof(S)));
      std::memcpy(heap, numbers, n * sizeof(S));
      for (int i = n; i < 32; ++i) expected[i] = 0.0f;
      Vec::load_block_first(heap, n, x0, x1);
      if (Vec::kDeinterleaves<S>) Vec::interleave(x0, x1);
      expect_lanes(what, x0, expected);
      expect_lanes(what, x1, expected + 16);
      if (n < 16) expect_lanes(what, load_partial<Vec>(heap, n), expected);
      std::free(heap);
    }
  }
}

void test_int4() {
  Int4Pair numbers[16];
  float expected[32];
  for (int i = 0; i < 16; ++i) {
    numbers[i].bits = static_cast<uint8_t>(i | (15 - i) << 4);
    expected[2 * i] = static_cast<float>(i - 8);
    expected[2 * i + 1] = static_cast<float>(7 - i);
  }
  expect_lanes("int4", Vec::load(numbers), expected);
  Vec::F x0, x1;
  Vec::load_block(numbers, x0, x1);
  Vec::interleave(x0, x1);
  expect_lanes("int4 block", x0, expected);
  expect_lanes("int4 block", x1, expected + 16);
  expect_parts("int4", numbers, expected);
}

// Products of words, by the definitions in vec_portable.h.
void test_int16() {
  Int8 bytes[2][64];
  Int4Pair nibbles[2][32];
  const auto nibble = [&](int row, int i) {
    const int bits = nibbles[row][i / 2].bits;
    return (i % 2 ? bits >> 4 : bits & 15) - 8;
  };
  for (int row = 0; row < 2; ++row) {
    for (int i = 0; i < 64; ++i) bytes[row][i].value = static_cast<int8_t>(i * 37 + row * 91);
    for (int i = 0; i < 32; ++i) nibbles[row][i].bits = static_cast<uint8_t>(i * 53 + row * 17);
  }
  const auto word = [](Vec::I x, int i) {
    int16_t words[32];
    std::memcpy(words, &x, sizeof words);
    return words[i];
  };
  const auto check = [](const char* what, int got, int expected) {
    expect(got == expected, what, got, expected);
  };
  Vec::I x[2];
  Vec::load_int16(bytes[0], x[0], x[1]);
  for (int i = 0; i < 64; ++i) check("int8", word(x[i / 32], i % 32), bytes[0][i].value);
  Vec::load_int16(nibbles[0], x[0], x[1]);
  for (int i = 0; i < 64; ++i) check("int4", word(x[i % 2], i / 2), nibble(0, i));
  Vec::load_pairs(bytes[0], bytes[1], x[0], x[1]);
  for (int i = 0; i < 64; ++i) {
    check("pairs of int8", word(x[i / 32], i % 32), bytes[i % 2][i / 2].value);
  }
  Vec::load_pairs(nibbles[0], nibbles[1], x[0], x[1]);
  for (int i = 0; i < 64; ++i) {
    check("pairs of int4", word(x[i / 2 % 2], i / 4 * 2 + i % 2), nibble(i % 2, i / 2));
  }
  int16_t words[32];
  Vec::store_int16(words, Vec::add(Vec::iota(), Vec::set1(-32767.4f)));
  check("words of floats", words[1], -32766);
  Vec::store_int16(words, Vec::set1(40000.0f));
  check("words of large floats", words[3], 32767);
  for (int i = 0; i < 32; ++i) words[i] = static_cast<int16_t>(i * 1000 - 16000);
  Vec::I sum = Vec::zero_integers();
  Vec::add_products(sum, Vec::load_int16(words), Vec::set_pair(words + 4));
  Vec::add_products(sum, Vec::load_int16(words), Vec::set_pair(words + 4));
  const Vec::F sums = Vec::to_float(sum);
  for (int i = 0; i < 16; ++i) {
    const int expected = 2 * (words[2 * i] * words[4] + words[2 * i + 1] * words[5]);
    expect(sums[i] == static_cast<float>(expected), "products", sums[i], expected);
  }
}

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

void test_rounding() {
  for (uint64_t bits = 0x00800000; bits < 0x100000000; bits += 0x3fff1) {
    const float x = float_of(static_cast<uint32_t>(bits));
    if (std::fpclassify(x) == FP_SUBNORMAL) continue;  // flushed, see below
    BFloat16 bf16[16];
    Float16 fp16[16];
    Vec::store(bf16, Vec::set1(x));
    Vec::store(fp16, Vec::set1(x));
    const float expected = to_float(to_bfloat16(x));
    if (!std::isnan(x)) expect(bf16[5].bits == to_bfloat16(x).bits, "to bf16", bf16[5].bits, x);
    if (std::isnan(x)) expect(std::isnan(to_float(bf16[5])), "NaN to bf16", bf16[5].bits, x);
    expect(fp16[5].bits == to_float16(x).bits, "to fp16", fp16[5].bits, x);
    const float rounded = Vec::round_to(Vec::set1(x), bf16)[3];
    expect(rounded == expected || std::isnan(x), "round to bf16", rounded, expected);
  }
  BFloat16 narrow[16];
  Vec::store(narrow, Vec::set1(-1e-39f));
  expect(narrow[0].bits == 0x8000, "subnormal to bf16", narrow[0].bits, 0x8000);
}

void test_lanes() {
  Vec::F x[16];
  float sums[4], a[2], b[2];
  for (int i = 0; i < 16; ++i) x[i] = Vec::add(Vec::iota(), Vec::set1(100.0f * i));
  const Vec::F four[4] = {x[0], x[1], x[2], x[3]};
  Vec::store_sums4(sums, four);
  Vec::store_sums2x2(a, b, four);
  for (int i = 0; i < 4; ++i) {
    const float expected = 1600.0f * i + 120;
    expect(sums[i] == expected, "store_sums4", sums[i], expected);
    expect((i < 2 ? a[i] : b[i - 2]) == expected, "store_sums2x2", (i < 2 ? a : b)[i % 2],
           expected);
    expect(Vec::reduce_add(four[i]) == expected, "reduce_add", Vec::reduce_add(four[i]), expected);
  }
  expect(Vec::reduce_max(x[3]) == 315, "reduce_max", Vec::reduce_max(x[3]), 315);
  Vec::transpose(x);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) expect(x[i][j] == 100 * j + i, "transpose", x[i][j], 100 * j + i);
  Vec::F even = x[0], odd = x[1];
  Vec::deinterleave(even, odd);
  expect(even[8] == x[1][0] && odd[7] == x[0][15], "split", even[8], x[1][0]);
  Vec::interleave(even, odd);
  expect(even[9] == x[0][9] && odd[2] == x[1][2], "join", even[9], x[0][9]);
}

// 32 numbers of 0 but the first two.
__m512bh pairs(float first, float second) {
  __m512bh x{};
  x[0] = to_bfloat16(first).bits;
  x[1] = to_bfloat16(second).bits;
  return x;
}

float dot(float sum, float a0, float a1, float b0, float b1) {
  return _mm512_dpbf16_ps(Vec::set1(sum), pairs(a0, a1), pairs(b0, b1))[0];
}

float tile_dot(float sum, float a0, float a1, float b0, float b1) {
  alignas(64) unsigned char config[64] = {1};
  for (int tile = 0; tile < 3; ++tile) {
    config[16 + 2 * tile] = 64;
    config[48 + tile] = 16;
  }
  float c[16][16] = {};
  __m512bh a[16] = {}, b[16] = {};
  c[3][0] = sum;
  a[3] = pairs(a0, a1);
  b[0] = pairs(b0, b1);
  _tile_loadconfig(config);
  _tile_loadd(0, c, 64);
  _tile_loadd(1, a, 64);
  _tile_loadd(2, b, 64);
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, c, 64);
  _tile_release();
  expect(c[2][0] == 0 && c[3][1] == 0, "other sums of the tile", c[2][0], 0);
  return c[3][0];
}

void test_dot_products() {
  const float big = 0x1p24f;  // whose next number is big + 2
  const auto check = [](const char* what, float got, float expected) {
    expect(got == expected, what, got, expected);
  };
  check("vdpbf16ps rounds after each product", dot(big, 1, 1, 1, 1), big);
  check("tdpbf16ps adds the products first", tile_dot(big, 1, 1, 1, 1), big + 2);
  check("vdpbf16ps takes the odd product first", dot(big, -big, 1, 1, 1), 0);
  check("vdpbf16ps takes the even product last", dot(big, 1, -big, 1, 1), 1);
  check("tdpbf16ps cancels among its products", tile_dot(1, big, -big, 1, 1), 1);
  const float tiny = 0x1p-130f;  // subnormal, in bf16, too
  check("vdpbf16ps takes subnormals for 0", dot(0, tiny, 0, 0x1p100f, 0), 0);
  check("tdpbf16ps takes subnormals for 0", tile_dot(0, 0, tiny, 0, 0x1p100f), 0);
  check("vdpbf16ps flushes results", dot(0, 0x1p-70f, 0, 0x1p-60f, 0), 0);
  check("tdpbf16ps flushes results", tile_dot(0, 0x1p-70f, 0, 0x1p-60f, 0), 0);
  check("vdpbf16ps flushes its addend", dot(tiny, 0, 0, 0, 0), 0);
  check("an exact product", dot(0, 1.9921875f, 0, 1.9921875f, 0), 1.9921875f * 1.9921875f);
}

// The product of packed operands, by the definition in pairs.h.
void test_packing() {
  constexpr int kRowsOfB = 45, kDims = 70;
  BFloat16 numbers[kRowsOfB][kDims];
  const BFloat16* rows[kRowsOfB];
  for (int r = 0; r < kRowsOfB; ++r) {
    rows[r] = numbers[r];
    for (int d = 0; d < kDims; ++d) numbers[r][d] = to_bfloat16(static_cast<float>(r * 71 + d));
  }
  // Number `i` of those that are summed over, of column `column`.
  const auto packed = [](const BFloat16* chunk, int i, int column) {
    return chunk[column / 16 * kTileNumbers + i / 2 * 32 + column % 16 * 2 + i % 2].bits;
  };
  const auto number = [&](int r, int d) {
    return r < kRowsOfB && d < kDims ? numbers[r][d].bits : 0;
  };
  static BFloat16 columns[2 * 3 * kChunkNumbers], interleaved[3 * 4 * kChunkNumbers];
  pack_columns<Vec>(rows, kRowsOfB, kDims, columns);
  pack_interleaved(rows, kRowsOfB, kDims, 4 * kChunk, interleaved);
  float place[32];  // of each column in pack_interleaved's chunks
  for (int i = 0; i < 32; ++i) place[i] = static_cast<float>(i);
  Vec::order_columns(place);
  for (int r = 0; r < 2 * kChunk; ++r) {
    for (int d = 0; d < 3 * kChunk; ++d) {
      const BFloat16* chunk = columns + (r / 32 * 3 + d / 32) * kChunkNumbers;
      expect(packed(chunk, d % 32, r % 32) == number(r, d), "pack_columns", r, d);
      chunk = interleaved + (d / 32 * 4 + r / 32) * kChunkNumbers;
      const int column = static_cast<int>(place[d % 32]);
      expect(packed(chunk, r % 32, column) == number(r, d), "pack_interleaved", r, d);
    }
  }
}

}  // namespace

int main() {
  test_loads<BFloat16, uint16_t>("bf16", 0x10000);
  test_loads<Float16, uint16_t>("fp16", 0x10000);
  test_loads<Float8E4M3, uint8_t>("e4m3", 0x100);
  test_loads<Float8E5M2, uint8_t>("e5m2", 0x100);
  test_loads<Int8, uint8_t>("int8", 0x100);
  test_int4();
  test_int16();
  test_rounding();
  test_lanes();
  test_dot_products();
  test_packing();
  std::printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
