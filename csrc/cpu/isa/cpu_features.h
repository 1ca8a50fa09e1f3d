// Which instruction sets this binary has kernels for, and which of them this processor, its
// operating system and its process may use.
#pragma once

#include <cstdint>
#include <string>

// GQA_EMULATE_AVX512 compiles the AVX-512 and AMX kernels with tests/cpp/emulated_avx512.h in place
// of the instructions, for any processor.
#if defined(GQA_EMULATE_AVX512)
#define GQA_HAVE_AVX512
#define GQA_HAVE_AVX512_BF16
#define GQA_HAVE_AMX
#elif defined(__x86_64__)
#define GQA_HAVE_AVX512
#if __has_include(<avx512bf16intrin.h>)
#define GQA_HAVE_AVX512_BF16
#endif
#if __has_include(<amxbf16intrin.h>)
#define GQA_HAVE_AMX
#endif
#endif

namespace gqa::cpu {

// Best last. A set is chosen only if the sets that it builds on can be used, too.
enum class Isa {
  kPortable,
  kNeon,
  kNeonDot,
  kNeonFhm,
  kNeonBf16,
  kAvx2,
  kAvx512,
  kAvx512Bf16,
  kAmx
};
constexpr int kNumIsas = 9;

const char* isa_name(Isa isa);

// The results of the CPUID and XGETBV instructions; all 0 on other processors.
struct CpuRegisters {
  uint32_t max_leaf;
  uint32_t leaf1_ecx;
  uint32_t leaf7_ebx, leaf7_edx;
  uint32_t leaf7_1_eax;  // of subleaf 1
  uint64_t xcr0;         // register states that the operating system saves
};

// The x86 instruction sets that the registers allow, as bits 1 << Isa. A process must request AMX tiles
// from the operating system: request_tiles() does so and returns whether it may use them. It is
// called only if everything else is supported.
uint32_t usable_isas(const CpuRegisters& cpu, bool (*request_tiles)());

// What the operating system says of an aarch64 processor; all false on others.
struct ArmFeatures {
  bool neon;
  bool dot_products;   // FEAT_DotProd: SDOT
  bool fp16_to_fp32;   // FEAT_FHM: FMLAL
  bool bf16;           // FEAT_BF16: BFDOT
  bool byte_matrices;  // FEAT_I8MM: SMMLA
};
uint32_t usable_isas(const ArmFeatures& cpu);

// Those that this process can use and this binary has; found once.
uint32_t supported_isas();

// The best of them, or the one that GQA_KERNELS_CPU_ISA names. The variable is read at every call,
// because tests change it. Throws std::invalid_argument for an unknown or unsupported name.
Isa chosen_isa();

// Whether multiply-adds are as fast with subnormal operands as with others. They were on the AMD
// EPYC where this was measured, and we assume the same of all AMD processors; Intel's manuals warn
// of a microcode assist. GQA_KERNELS_CPU_SUBNORMALS=cheap or =costly overrides this; it is read at
// every call.
bool cheap_subnormals();

// The table for `isa`, or the best one below it that this process can use, among the tables for
// which offers(table) is true. `tables`: best first; the last one is for any processor.
template <class Table, int kCount, class Offers>
const Table& select_kernels(const Table* const (&tables)[kCount], Isa isa, Offers offers) {
  for (const Table* table : tables) {
    const bool supported = supported_isas() >> static_cast<int>(table->isa) & 1;
    if (table->isa <= isa && supported && offers(*table)) return *table;
  }
  return *tables[kCount - 1];
}

}  // namespace gqa::cpu
