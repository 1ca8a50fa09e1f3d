#include "cpu_features.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif
#if defined(__aarch64__)
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#endif

namespace gqa::cpu {
namespace {

constexpr uint32_t bit(int n) { return 1u << n; }
constexpr uint32_t bit(Isa isa) { return bit(static_cast<int>(isa)); }

// Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, CPUID, and volume 1,
// section 13.3 (states of XCR0).
constexpr uint32_t kFma = bit(12), kOsXsave = bit(27), kAvx = bit(28), kF16c = bit(29);
constexpr uint32_t kAvx2 = bit(5);
constexpr uint32_t kAvx512 = bit(16) | bit(17) | bit(30) | bit(31);  // F, DQ, BW, VL
constexpr uint32_t kAvx512Bf16 = bit(5);
constexpr uint32_t kAmx = bit(22) | bit(24);                          // BF16, TILE
constexpr uint64_t kYmmState = bit(1) | bit(2);                       // XMM, upper halves of YMM
constexpr uint64_t kZmmState = kYmmState | bit(5) | bit(6) | bit(7);  // masks, ZMM, ZMM16-31
constexpr uint64_t kTileState = bit(17) | bit(18);

bool all(uint64_t value, uint64_t bits) { return (value & bits) == bits; }

CpuRegisters read_registers() {
  CpuRegisters cpu{};
#if defined(__x86_64__)
  uint32_t eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return cpu;
  cpu.leaf1_ecx = ecx;
  cpu.max_leaf = __get_cpuid_max(0, nullptr);
  if (cpu.max_leaf >= 7) {
    __cpuid_count(7, 0, eax, ebx, ecx, edx);
    const uint32_t last_subleaf = eax;
    cpu.leaf7_ebx = ebx;
    cpu.leaf7_edx = edx;
    if (last_subleaf >= 1) {
      __cpuid_count(7, 1, eax, ebx, ecx, edx);
      cpu.leaf7_1_eax = eax;
    }
  }
  if (cpu.leaf1_ecx & kOsXsave) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    cpu.xcr0 = static_cast<uint64_t>(high) << 32 | low;
  }
#endif
  return cpu;
}

#if defined(__aarch64__) && defined(__APPLE__)
bool has_feature(const char* name) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
#endif

ArmFeatures read_arm_features() {
  ArmFeatures cpu{};
#if defined(__aarch64__)
  cpu.neon = true;  // which every such processor has
#if defined(__linux__)
  // The kernel's arch/arm64/include/uapi/asm/hwcap.h; older headers of the C library lack some.
  const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
  cpu.dot_products = first >> 20 & 1;
  cpu.fp16_to_fp32 = first >> 23 & 1;
  cpu.byte_matrices = second >> 13 & 1;
  cpu.bf16 = second >> 14 & 1;
#elif defined(__APPLE__)
  cpu.dot_products = has_feature("hw.optional.arm.FEAT_DotProd");
  cpu.fp16_to_fp32 = has_feature("hw.optional.arm.FEAT_FHM");
  cpu.byte_matrices = has_feature("hw.optional.arm.FEAT_I8MM");
  cpu.bf16 = has_feature("hw.optional.arm.FEAT_BF16");
#endif
#endif
  return cpu;
}

// Linux only lets a process use tiles after it has requested them, because they add 8 KiB to every
// context switch.
bool request_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr int kArchReqXcompPerm = 0x1023;  // asm/prctl.h, Linux 5.16
  constexpr int kTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kTileData) == 0;
#else
  return false;
#endif
}

// The sets that this binary has kernels for.
constexpr uint32_t kCompiled = bit(Isa::kPortable)
#if defined(__x86_64__)
                               | bit(Isa::kAvx2)
#endif
#if defined(GQA_HAVE_AVX512)
                               | bit(Isa::kAvx512)
#endif
#if defined(GQA_HAVE_AVX512_BF16)
                               | bit(Isa::kAvx512Bf16)
#endif
#if defined(GQA_HAVE_AMX)
                               | bit(Isa::kAmx)
#endif
#if defined(__aarch64__)
                               | bit(Isa::kNeon) | bit(Isa::kNeonDot) | bit(Isa::kNeonFhm) |
                               bit(Isa::kNeonBf16)
#endif
    ;

}  // namespace

const char* isa_name(Isa isa) {
  constexpr const char* kNames[kNumIsas] = {"portable", "neon",        "neon_dot",
                                            "neon_fhm", "neon_bf16",   "avx2",
                                            "avx512",   "avx512_bf16", "amx"};
  return kNames[static_cast<int>(isa)];
}

uint32_t usable_isas(const CpuRegisters& cpu, bool (*request_tiles)()) {
  uint32_t isas = bit(Isa::kPortable);
  if (cpu.max_leaf < 7 || !all(cpu.leaf1_ecx, kFma | kOsXsave | kAvx | kF16c)) return isas;
  if (!all(cpu.xcr0, kYmmState) || !all(cpu.leaf7_ebx, kAvx2)) return isas;
  isas |= bit(Isa::kAvx2);
  if (!all(cpu.xcr0, kZmmState) || !all(cpu.leaf7_ebx, kAvx512)) return isas;
  isas |= bit(Isa::kAvx512);
  if (!all(cpu.leaf7_1_eax, kAvx512Bf16)) return isas;
  isas |= bit(Isa::kAvx512Bf16);
  if (!all(cpu.leaf7_edx, kAmx) || !all(cpu.xcr0, kTileState) || !request_tiles()) return isas;
  return isas | bit(Isa::kAmx);
}

uint32_t usable_isas(const ArmFeatures& cpu) {
  uint32_t isas = bit(Isa::kPortable);
  if (!cpu.neon) return isas;
  isas |= bit(Isa::kNeon);
  if (!cpu.dot_products) return isas;
  isas |= bit(Isa::kNeonDot);
  if (!cpu.fp16_to_fp32) return isas;
  isas |= bit(Isa::kNeonFhm);
  return cpu.bf16 && cpu.byte_matrices ? isas | bit(Isa::kNeonBf16) : isas;
}

uint32_t supported_isas() {
  static const uint32_t isas = [] {
    uint32_t usable =
        usable_isas(read_registers(), request_tiles) | usable_isas(read_arm_features());
#if defined(GQA_EMULATE_AVX512)
    usable |= bit(Isa::kAvx512) | bit(Isa::kAvx512Bf16) | bit(Isa::kAmx);
#endif
    return usable & kCompiled;
  }();
  return isas;
}

Isa chosen_isa() {
  const char* forced = std::getenv("GQA_KERNELS_CPU_ISA");
  std::string names;
  for (int i = kNumIsas - 1; i >= 0; --i) {
    const Isa isa = static_cast<Isa>(i);
    if (!(supported_isas() & bit(isa))) continue;
    if (forced == nullptr || *forced == '\0' || std::strcmp(forced, isa_name(isa)) == 0) return isa;
    names += names.empty() ? isa_name(isa) : std::string(", ") + isa_name(isa);
  }
  throw std::invalid_argument("GQA_KERNELS_CPU_ISA must be one of " + names + ", got " + forced);
}

bool cheap_subnormals() {
  static const bool amd = [] {
    char vendor[13] = {};
#if defined(__x86_64__)
    uint32_t eax, registers[3];
    if (__get_cpuid(0, &eax, &registers[0], &registers[2], &registers[1])) {
      std::memcpy(vendor, registers, sizeof registers);
    }
#endif
    return std::strcmp(vendor, "AuthenticAMD") == 0 || std::strcmp(vendor, "HygonGenuine") == 0;
  }();
  const char* forced = std::getenv("GQA_KERNELS_CPU_SUBNORMALS");
  return forced == nullptr || *forced == '\0' ? amd : std::strcmp(forced, "cheap") == 0;
}

}  // namespace gqa::cpu

// For callers without a header (gqa_kernels/native/build.py): the name of chosen_isa(), or nullptr
// if that throws.
extern "C" __attribute__((visibility("default"))) const char* gqa_kernels_cpu_isa() {
  try {
    return gqa::cpu::isa_name(gqa::cpu::chosen_isa());
  } catch (const std::invalid_argument&) {
    return nullptr;
  }
}
