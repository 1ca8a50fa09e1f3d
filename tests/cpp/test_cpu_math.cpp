// Vector arithmetic of every instruction set against double precision and against the format's
// definition.
#define GQA_ISA portable
#include "cpu/isa/math.h"
#include "cpu/isa/vec_portable.h"
#undef GQA_ISA

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace {

using gqa::BFloat16;
using gqa::Float16;
using namespace gqa::cpu::portable;

int failures = 0;

void expect(bool ok, const char* what, double got, double expected) {
  if (ok) return;
  ++failures;
  std::printf("FAILED %s: got %.9g, expected %.9g\n", what, got, expected);
}

double ulps(float got, double expected) {
  const float nearest = static_cast<float>(expected);
  const double unit = std::nextafter(std::fabs(nearest), INFINITY) - std::fabs(nearest);
  return std::fabs(got - expected) / unit;
}

float exp2_of(float x) {
  float lanes[Vec::kWidth];
  Vec::store(lanes, exp2<Vec>(Vec::set1(x)));
  return lanes[0];
}

// Every fp16 number: sign, exponent and fraction read by the format's definition.
void test_float16() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
    const double sign = bits & 0x8000 ? -1.0 : 1.0;
    double expected = exponent == 0    ? std::ldexp(fraction, -24)
                      : exponent == 31 ? (fraction ? NAN : INFINITY)
                                       : std::ldexp(1024 + fraction, exponent - 25);
    expected *= sign;
    const Float16 x{static_cast<uint16_t>(bits)};
    const float wide = to_float(x);
    expect(wide == expected || (std::isnan(wide) && std::isnan(expected)), "fp16 to fp32", wide,
           expected);
    if (!std::isnan(expected))
      expect(to_float16(wide).bits == bits, "fp16 there and back", wide, expected);
  }
  // Halfway cases go to the even neighbour; just beyond them, away.
  for (uint32_t bits = 0; bits < 0x7bff; ++bits) {
    const double low = to_float(Float16{static_cast<uint16_t>(bits)});
    const double high = to_float(Float16{static_cast<uint16_t>(bits + 1)});
    const float middle = static_cast<float>((low + high) / 2);
    expect(to_float16(middle).bits == (bits & 1 ? bits + 1 : bits), "fp16 halfway", middle, low);
    expect(to_float16(std::nextafter(middle, INFINITY)).bits == bits + 1, "fp16 above halfway",
           middle, high);
  }
  expect(to_float16(65519.0f).bits == 0x7bff, "fp16 largest", 65519, 65504);
  expect(to_float16(65520.0f).bits == 0x7c00, "fp16 overflow", 65520, INFINITY);
}

void test_bfloat16() {
  for (uint32_t bits = 0; bits < 0x7f80; ++bits) {
    const BFloat16 x{static_cast<uint16_t>(bits)};
    const double low = to_float(x);
    const double high = to_float(BFloat16{static_cast<uint16_t>(bits + 1)});
    expect(to_bfloat16(static_cast<float>(low)).bits == bits, "bf16 there and back", low, low);
    if (std::isinf(high)) continue;
    const float middle = static_cast<float>((low + high) / 2);
    expect(to_bfloat16(middle).bits == (bits & 1 ? bits + 1 : bits), "bf16 halfway", middle, low);
  }
  expect(std::isnan(to_float(to_bfloat16(NAN))), "bf16 NaN", 0, NAN);
}

void test_functions() {
  double worst_exp2 = 0, worst_tanh = 0;
  for (double x = -125; x < 20; x += 0.000731) {
    const float xf = static_cast<float>(x);
    worst_exp2 = std::fmax(worst_exp2, ulps(exp2_of(xf), std::exp2(static_cast<double>(xf))));
  }
  for (double x = -12; x < 12; x += 0.000137) {
    const float xf = static_cast<float>(x);
    const float got = tanh<Vec>(Vec::set1(xf))[0];
    worst_tanh = std::fmax(worst_tanh, ulps(got, std::tanh(static_cast<double>(xf))));
  }
  std::printf("largest error: exp2 %.2f ulp, tanh %.2f ulp\n", worst_exp2, worst_tanh);
  expect(worst_exp2 <= 1.2, "exp2 ulp", worst_exp2, 1.2);
  expect(worst_tanh <= 2, "tanh ulp", worst_tanh, 2);
  expect(exp2_of(-INFINITY) == 0, "exp2(-inf)", exp2_of(-INFINITY), 0);
  expect(exp2_of(-127) == 0, "exp2(-127)", exp2_of(-127), 0);
  expect(exp2_of(0) == 1, "exp2(0)", exp2_of(0), 1);
  expect(std::isnan(exp2_of(NAN)), "exp2(NaN)", exp2_of(NAN), NAN);
  expect(tanh<Vec>(Vec::set1(INFINITY))[0] == 1, "tanh(inf)", tanh<Vec>(Vec::set1(INFINITY))[0], 1);
  expect(std::isnan(tanh<Vec>(Vec::set1(NAN))[0]), "tanh(NaN)", tanh<Vec>(Vec::set1(NAN))[0], NAN);
}

}  // namespace

int main() {
  test_float16();
  test_bfloat16();
  test_functions();
  std::printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
