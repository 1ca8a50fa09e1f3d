// The floating-point mode that kernels run in. Callers may have flushed subnormal numbers to zero
// (torch.set_flush_denormal, libraries linked with -ffast-math) or changed the rounding, and every
// thread of a pool has a mode of its own. fp8 and fp16 numbers pass through subnormal fp32 numbers,
// so flushing would lose them; and one result must not depend on which thread computed it.
#pragma once

#include <cstdint>
#if !defined(__x86_64__) && !defined(__aarch64__)
#include <cfenv>
#endif

namespace gqa::cpu {

// While it lives, the calling thread rounds to nearest even, keeps subnormal numbers, and traps no
// exception. Its end restores the mode that was there before, with its exception flags.
class DefaultFloatMode {
 public:
#if defined(__x86_64__)
  DefaultFloatMode() {
    constexpr uint32_t kDefault = 0x1f80;  // MXCSR after a reset
    __asm__ volatile("stmxcsr %0" : "=m"(before_));
    __asm__ volatile("ldmxcsr %0" : : "m"(kDefault) : "memory");
  }
  ~DefaultFloatMode() { __asm__ volatile("ldmxcsr %0" : : "m"(before_) : "memory"); }
#elif defined(__aarch64__)
  DefaultFloatMode() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(before_));
    __asm__ volatile("msr fpcr, %0" : : "r"(uint64_t{0}) : "memory");
  }
  ~DefaultFloatMode() { __asm__ volatile("msr fpcr, %0" : : "r"(before_) : "memory"); }
#else
  DefaultFloatMode() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatMode() { std::fesetenv(&before_); }
#endif
  DefaultFloatMode(const DefaultFloatMode&) = delete;
  DefaultFloatMode& operator=(const DefaultFloatMode&) = delete;

 private:
#if defined(__x86_64__)
  uint32_t before_;
#elif defined(__aarch64__)
  uint64_t before_;
#else
  std::fenv_t before_;
#endif
};

}  // namespace gqa::cpu
