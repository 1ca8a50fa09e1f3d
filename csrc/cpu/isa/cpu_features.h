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

// Best last. Each is chosen only where the ones it is built upon can be used, too.
enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx };
constexpr int kNumIsas = 5;

const char* isa_name(Isa isa);

// What the CPUID and XGETBV instructions say; all 0 where there are none.
struct CpuRegisters {
  uint32_t max_leaf;
  uint32_t leaf1_ecx;
  uint32_t leaf7_ebx, leaf7_edx;
  uint32_t leaf7_1_eax;  // of subleaf 1
  uint64_t xcr0;         // register states that the operating system saves
};

// The instruction sets that the registers allow, as bits 1 << Isa. The operating system gives AMX
// tiles to processes that ask: request_tiles() does, and says whether it may use them; it is called
// only where everything else is there.
uint32_t usable_isas(const CpuRegisters& cpu, bool (*request_tiles)());

// Those that this process can use and this binary has; found once.
uint32_t supported_isas();

// The best of them, or the one that GQA_KERNELS_CPU_ISA names. Read at every call: tests change it.
// Throws std::invalid_argument where the name is none of them.
Isa chosen_isa();

// Whether multiply-adds take subnormal operands as fast as others. They do on the AMD EPYC that
// this was tried on, and AMD's are taken to be alike; Intel's manuals warn of an assist by
// microcode. GQA_KERNELS_CPU_SUBNORMALS=cheap or =costly says so instead; read at every call.
bool cheap_subnormals();

// The table for `isa`, or the best below it that this process can use, among those that offer(s)
// what is wanted. `tables`: best first; the last one is for any processor.
template <class Table, int kCount, class Offers>
const Table& select_kernels(const Table* const (&tables)[kCount], Isa isa, Offers offers) {
  for (const Table* table : tables) {
    const bool supported = supported_isas() >> static_cast<int>(table->isa) & 1;
    if (table->isa <= isa && supported && offers(*table)) return *table;
  }
  return *tables[kCount - 1];
}

}  // namespace gqa::cpu
