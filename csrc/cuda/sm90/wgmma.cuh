// Warpgroup matrix products: 64 x N x 16 per instruction, asynchronous, fp32 sums in registers.
// Operands in shared memory are tiles of rows of 64 elements (128 bytes) with the 128-byte swizzle,
// as TMA writes them.
//
// Accumulator of a warpgroup, lane l of warp w (PTX ISA, "Register Fragments for wgmma.m64nNk16"):
// d[4 j + 2 h + e] is row 16 w + l / 4 + 8 h, column 8 j + 2 (l % 4) + e. Pairs of it packed to 16
// bits are the A operand of the next product.
#pragma once

#include <cstdint>

#include "../../core/params.h"

namespace gqa::cuda::sm90 {

// Orders register accesses before the next product.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Returns when at most kPending groups of products are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving accesses to registers that an unfinished product owns.
template <int kCount>
__device__ __forceinline__ void pin(float (&r)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i++) asm volatile("" : "+f"(r[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void pin(uint32_t (&r)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i++) asm volatile("" : "+r"(r[i])::"memory");
}

// Matrix descriptor (PTX ISA, "Matrix Descriptor Format").
//   K-major operand: `stride` bytes between groups of 8 rows; `lead` is not used.
//   MN-major operand: `lead` bytes between panels of 64 columns, `stride` between groups of 8 k.
__device__ __forceinline__ uint64_t swizzled_operand(uint32_t address, uint32_t lead,
                                                     uint32_t stride) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) |
         (static_cast<uint64_t>(lead >> 4) << 16) | (static_cast<uint64_t>(stride >> 4) << 32) |
         (1ull << 62);
}
// The same operand, `bytes` further on.
__device__ __forceinline__ uint64_t advance(uint64_t operand, int bytes) {
  return operand + (bytes >> 4);
}

// Wgmma<T, N>: T is BFloat16 or Float16.
//   ss: d (+)= A B, A [64, 16] and B [N, 16] K-major in shared memory
//   rs: d (+)= A B, A in registers, B [16, N] MN-major in shared memory
template <class T, int kN>
struct Wgmma;

#define GQA_F8(i)                                                                             \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define GQA_F32(i) GQA_F8(i), GQA_F8(i + 8), GQA_F8(i + 16), GQA_F8(i + 24)
#define GQA_OPERANDS_32 GQA_F32(0)
#define GQA_OPERANDS_40 GQA_F32(0), GQA_F8(32)
#define GQA_OPERANDS_64 GQA_F32(0), GQA_F32(32)
#define GQA_OPERANDS_88 GQA_F32(0), GQA_F32(32), GQA_F8(64), GQA_F8(72), GQA_F8(80)
#define GQA_OPERANDS_128 GQA_F32(0), GQA_F32(32), GQA_F32(64), GQA_F32(96)
// The names %0, %1, ... of the operands: tens %t0 to %t9, then the rest.
#define GQA_TEN(t) \
  "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9,"
#define GQA_NAMES_30 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9," GQA_TEN(1) GQA_TEN(2)
#define GQA_NAMES_32 GQA_NAMES_30 "%30,%31"
#define GQA_NAMES_40 GQA_NAMES_30 "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39"
#define GQA_NAMES_60 GQA_NAMES_30 GQA_TEN(3) GQA_TEN(4) GQA_TEN(5)
#define GQA_NAMES_64 GQA_NAMES_60 "%60,%61,%62,%63"
#define GQA_NAMES_80 GQA_NAMES_60 GQA_TEN(6) GQA_TEN(7)
#define GQA_NAMES_88 GQA_NAMES_80 "%80,%81,%82,%83,%84,%85,%86,%87"
#define GQA_NAMES_120 GQA_NAMES_80 GQA_TEN(8) GQA_TEN(9) GQA_TEN(10) GQA_TEN(11)
#define GQA_NAMES_128 GQA_NAMES_120 "%120,%121,%122,%123,%124,%125,%126,%127"

// COUNT = N / 2 accumulators; I0 to I5 are the numbers of the operands after them.
#define GQA_WGMMA(T, TYPE, N, COUNT, I0, I1, I2, I3, I4, I5)                                    \
  template <>                                                                                   \
  struct Wgmma<T, N> {                                                                          \
    static __device__ __forceinline__ void ss(float (&d)[COUNT], uint64_t a, uint64_t b,        \
                                              bool accumulate) {                                \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I2                                     \
                   ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE        \
                   " {" GQA_NAMES_##COUNT "}, %" #I0 ", %" #I1 ", p, 1, 1, 0, 0;\n}"            \
                   : GQA_OPERANDS_##COUNT                                                       \
                   : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                        \
    }                                                                                           \
    static __device__ __forceinline__ void rs(float (&d)[COUNT], const uint32_t* a, uint64_t b, \
                                              bool accumulate) {                                \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I5                                     \
                   ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE        \
                   " {" GQA_NAMES_##COUNT "}, {%" #I0 ",%" #I1 ",%" #I2 ",%" #I3 "}, %" #I4     \
                                          ", p, 1, 1, 1;\n}"                                    \
                   : GQA_OPERANDS_##COUNT                                                       \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                        \
                     "r"(static_cast<int>(accumulate)));                                        \
    }                                                                                           \
  };
#define GQA_WGMMA_SHAPES(T, TYPE)                     \
  GQA_WGMMA(T, TYPE, 64, 32, 32, 33, 34, 35, 36, 37)  \
  GQA_WGMMA(T, TYPE, 80, 40, 40, 41, 42, 43, 44, 45)  \
  GQA_WGMMA(T, TYPE, 128, 64, 64, 65, 66, 67, 68, 69) \
  GQA_WGMMA(T, TYPE, 176, 88, 88, 89, 90, 91, 92, 93) \
  GQA_WGMMA(T, TYPE, 256, 128, 128, 129, 130, 131, 132, 133)
GQA_WGMMA_SHAPES(BFloat16, "bf16")
GQA_WGMMA_SHAPES(Float16, "f16")

#undef GQA_WGMMA_SHAPES
#undef GQA_WGMMA
#undef GQA_NAMES_128
#undef GQA_NAMES_120
#undef GQA_NAMES_88
#undef GQA_NAMES_80
#undef GQA_NAMES_64
#undef GQA_NAMES_60
#undef GQA_NAMES_40
#undef GQA_NAMES_32
#undef GQA_NAMES_30
#undef GQA_TEN
#undef GQA_OPERANDS_128
#undef GQA_OPERANDS_88
#undef GQA_OPERANDS_64
#undef GQA_OPERANDS_40
#undef GQA_OPERANDS_32
#undef GQA_F32
#undef GQA_F8

}  // namespace gqa::cuda::sm90
