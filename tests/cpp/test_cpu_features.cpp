// Which kernels a processor gets, from what CPUID would say on machines that are not here; and the
// environment variable that forces others.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/isa/cpu_features.h"

namespace {

using gqa::cpu::CpuRegisters;
using gqa::cpu::Isa;
using gqa::cpu::isa_name;

int failures = 0;
int requests = 0;  // for tiles

bool granted() {
  ++requests;
  return true;
}
bool refused() {
  ++requests;
  return false;
}

void expect_best(const char* machine, const CpuRegisters& cpu, bool (*request_tiles)(), Isa best,
                 int expected_requests) {
  requests = 0;
  const uint32_t isas = gqa::cpu::usable_isas(cpu, request_tiles);
  // Each set of x86 needs those below it, so their bits are ones up to the best.
  const uint32_t below_avx2 = (1u << static_cast<int>(Isa::kAvx2)) - 1;
  const uint32_t expected =
      (((2u << static_cast<int>(best)) - 1) & ~below_avx2) | 1u << static_cast<int>(Isa::kPortable);
  if (isas == expected && requests == expected_requests) return;
  ++failures;
  std::printf("FAILED %s: got sets %x after %d requests, expected %x after %d\n", machine, isas,
              requests, expected, expected_requests);
}

void test_machines() {
  // leaf 1 ECX: FMA, XSAVE, OSXSAVE, AVX, F16C; leaf 7 EBX: AVX2, AVX-512 F DQ BW VL and others.
  const uint32_t ecx = 1u << 12 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 29;
  const uint32_t avx2 = 1u << 3 | 1u << 5 | 1u << 8;
  const uint32_t avx512 = avx2 | 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31;
  const uint32_t amx = 1u << 22 | 1u << 24 | 1u << 25;
  const CpuRegisters zen3{16, ecx, avx2, 0, 0, 0x7};
  const CpuRegisters skylake_x{22, ecx, avx512, 0, 0, 0xe7};
  const CpuRegisters zen4{16, ecx, avx512, 0, 1u << 5, 0xe7};
  const CpuRegisters sapphire_rapids{32, ecx, avx512, amx, 1u << 4 | 1u << 5, 0x600e7};

  expect_best("no CPUID", CpuRegisters{}, granted, Isa::kPortable, 0);
  expect_best("Zen 3", zen3, granted, Isa::kAvx2, 0);
  expect_best("Skylake-X", skylake_x, granted, Isa::kAvx512, 0);
  expect_best("Zen 4", zen4, granted, Isa::kAvx512Bf16, 0);
  expect_best("Sapphire Rapids", sapphire_rapids, granted, Isa::kAmx, 1);
  expect_best("Sapphire Rapids, tiles refused", sapphire_rapids, refused, Isa::kAvx512Bf16, 1);

  CpuRegisters cpu = sapphire_rapids;
  cpu.xcr0 = 0xe7;
  expect_best("an old system that saves no tiles", cpu, granted, Isa::kAvx512Bf16, 0);
  cpu.xcr0 = 0x60007;
  expect_best("a system that saves no ZMM", cpu, granted, Isa::kAvx2, 0);
  cpu.xcr0 = 0x3;
  expect_best("a system that saves no YMM", cpu, granted, Isa::kPortable, 0);
  cpu = sapphire_rapids;
  cpu.leaf1_ecx &= ~(1u << 27);
  expect_best("a system without XSAVE", cpu, granted, Isa::kPortable, 0);
  cpu = sapphire_rapids;
  cpu.leaf7_edx = 1u << 24;
  expect_best("tiles without bf16", cpu, granted, Isa::kAvx512Bf16, 0);
  cpu = sapphire_rapids;
  cpu.leaf7_1_eax = 0;
  expect_best("tiles without AVX512_BF16", cpu, granted, Isa::kAvx512, 0);
  for (const int feature : {16, 17, 30, 31}) {
    cpu = sapphire_rapids;
    cpu.leaf7_ebx &= ~(1u << feature);
    expect_best("a part of AVX-512 missing", cpu, granted, Isa::kAvx2, 0);
  }
  cpu = sapphire_rapids;
  cpu.max_leaf = 6;
  expect_best("leaf 7 cut off", cpu, granted, Isa::kPortable, 0);
}

void expect_best(const char* machine, const gqa::cpu::ArmFeatures& cpu, Isa best) {
  const uint32_t isas = gqa::cpu::usable_isas(cpu);
  const uint32_t expected = (2u << static_cast<int>(best)) - 1;
  if (isas == expected) return;
  ++failures;
  std::printf("FAILED %s: got sets %x, expected %x\n", machine, isas, expected);
}

void test_arm_machines() {
  // NEON, DotProd, FHM, BF16, I8MM
  expect_best("no aarch64", {}, Isa::kPortable);
  expect_best("Cortex-A72", {true, false, false, false, false}, Isa::kNeon);
  expect_best("Neoverse N1", {true, true, false, false, false}, Isa::kNeonDot);
  expect_best("Apple M1", {true, true, true, false, false}, Isa::kNeonFhm);
  expect_best("Neoverse V1", {true, true, true, true, true}, Isa::kNeonBf16);
  expect_best("bf16 without byte matrices", {true, true, true, true, false}, Isa::kNeonFhm);
  expect_best("byte matrices without bf16", {true, true, true, false, true}, Isa::kNeonFhm);
  expect_best("bf16 without FHM", {true, true, false, true, true}, Isa::kNeonDot);
  expect_best("FHM without DotProd", {true, false, true, true, true}, Isa::kNeon);
}

struct Table {
  Isa isa;
  bool has_bf16;
};

void test_choice() {
  const uint32_t supported = gqa::cpu::supported_isas();
  Isa best = Isa::kPortable;
  for (int i = 0; i < gqa::cpu::kNumIsas; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (!(supported >> i & 1)) continue;
    best = isa;
    setenv("GQA_KERNELS_CPU_ISA", isa_name(isa), 1);
    failures += gqa::cpu::chosen_isa() != isa;
  }
  for (const char* unset : {"", static_cast<const char*>(nullptr)}) {
    unset ? setenv("GQA_KERNELS_CPU_ISA", unset, 1) : unsetenv("GQA_KERNELS_CPU_ISA");
    failures += gqa::cpu::chosen_isa() != best;
  }
  setenv("GQA_KERNELS_CPU_SUBNORMALS", "cheap", 1);
  failures += !gqa::cpu::cheap_subnormals();
  setenv("GQA_KERNELS_CPU_SUBNORMALS", "costly", 1);
  failures += gqa::cpu::cheap_subnormals();
  unsetenv("GQA_KERNELS_CPU_SUBNORMALS");
  setenv("GQA_KERNELS_CPU_ISA", "abacus", 1);
  try {
    gqa::cpu::chosen_isa();
    ++failures;
  } catch (const std::invalid_argument& error) {
    const std::string said = error.what();
    failures += said.find("portable, got abacus") == std::string::npos;
  }

  // A type that the chosen set has nothing for goes to the best one below it.
  const Table amx{Isa::kAmx, true}, none{Isa::kAvx512Bf16, false}, portable{Isa::kPortable, true};
  const Table* const tables[] = {&amx, &none, &portable};
  const auto choose = [&](Isa isa) -> const Table& {
    return gqa::cpu::select_kernels(tables, isa, [](const Table& t) { return t.has_bf16; });
  };
  failures += &choose(Isa::kAvx512Bf16) != &portable || &choose(Isa::kPortable) != &portable;
  const bool has_amx = supported >> static_cast<int>(Isa::kAmx) & 1;
  failures += &choose(Isa::kAmx) != (has_amx ? &amx : &portable);
}

}  // namespace

int main() {
  test_machines();
  test_arm_machines();
  test_choice();
  std::printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
