// How warps of one CTA wait for one another on Hopper: mbarriers in shared memory (which TMA can
// complete), named barriers, and the register hand-over between warpgroups.
#pragma once

#include <cstdint>

namespace gqa::cuda::sm90 {

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialised mbarriers visible to TMA.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and holds the phase open until TMA has also written `bytes`.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Returns once the phase of this parity is complete.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred p;\nWAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// A ring of kStages buffers, each with an mbarrier that says "full" and one that says "empty". The
// n-th buffer ever filled (n = 0, 1, ...) uses stage n % kStages.
template <int kStages>
struct Ring {
  static constexpr int kBytes = 2 * kStages * 8;
  uint32_t barriers;  // full [kStages], then empty [kStages]

  static __device__ __forceinline__ int stage(int n) { return n % kStages; }
  __device__ __forceinline__ uint32_t full(int n) const { return barriers + 8 * stage(n); }
  __device__ __forceinline__ uint32_t empty(int n) const { return full(n) + 8 * kStages; }

  // `readers`: arrivals that make a buffer empty again.
  __device__ __forceinline__ void init(int readers) const {
    for (int s = 0; s < kStages; s++) {
      mbarrier_init(full(s), 1);
      mbarrier_init(empty(s), readers);
    }
  }
  // `dependency` is 0; it makes the wait depend on whatever it was computed from.
  __device__ __forceinline__ void wait_full(int n, int dependency = 0) const {
    mbarrier_wait(full(n), ((n / kStages) & 1) ^ dependency);
  }
  // The first round of buffers is empty from the start.
  __device__ __forceinline__ void wait_empty(int n) const {
    mbarrier_wait(empty(n), ((n / kStages) & 1) ^ 1);
  }
};

// Named barrier: completes when `threads` threads have synced or arrived.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Registers per thread of this warpgroup from here on; all its warps execute it.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace gqa::cuda::sm90
