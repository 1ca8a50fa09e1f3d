// Results do not depend on the floating-point mode of the calling thread or of the pool's threads,
// and no call changes it: attention over fp8 and fp16 caches, appends and gradients of small
// numbers, for every instruction set, with subnormal numbers flushed to zero and rounding upwards.
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "core/append_params.h"
#include "core/backward_params.h"
#include "cpu/append/append.h"
#include "cpu/backward/backward.h"
#include "cpu/forward/attention.h"
#include "cpu/isa/cpu_features.h"

namespace {

using namespace gqa;

constexpr int64_t kHeads = 4, kKvHeads = 2, kKeys = 600, kDim = 64;
const std::vector<int32_t> kMap = {0, 1, 0, 1};

// Flushes subnormal operands and results to zero, and rounds upwards.
void set_strange_mode() {
  std::fesetround(FE_UPWARD);
#if defined(__x86_64__)
  uint32_t mode;
  __asm__ volatile("stmxcsr %0" : "=m"(mode));
  mode |= 0x8040;
  __asm__ volatile("ldmxcsr %0" : : "m"(mode));
#elif defined(__aarch64__)
  uint64_t mode;
  __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
  __asm__ volatile("msr fpcr, %0" : : "r"(mode | uint64_t{1} << 24));
#endif
}

// The half of the smallest normal number, computed at run time: 0 where results are flushed.
bool flushes() {
  volatile float smallest = 0x1p-126f;
  return smallest * 0.5f == 0.0f;
}

bool strange = false;  // the mode of the caller and of every other thread
int modes_lost = 0;

// Calls `call` in that mode, and looks whether it left the mode alone.
template <class Call>
void call_in_mode(Call call) {
  std::fenv_t before;
  std::fegetenv(&before);
  if (strange) set_strange_mode();
  const bool flushed = flushes();
  const int rounding = std::fegetround();
  call();
  modes_lost += flushes() != flushed || std::fegetround() != rounding;
  std::fesetenv(&before);
}

void run_on_threads(int64_t n, void (*body)(void*, int64_t), void* context) {
  std::vector<std::thread> threads;
  std::vector<int> lost(n);
  for (int64_t i = 0; i < n; ++i) {
    threads.emplace_back([=, &lost] {
      if (strange && i % 2 == 0) set_strange_mode();
      const bool flushed = flushes();
      body(context, i);
      lost[i] = flushes() != flushed;
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int x : lost) modes_lost += x;
}

// Rows of numbers of about `size`, as the bits of their type.
std::vector<uint8_t> numbers(std::mt19937& random, DType type, int64_t n, float size) {
  std::normal_distribution<float> normal;
  std::vector<uint8_t> bytes(n * (type == DType::kFloat32 ? 4 : type == DType::kFloat16 ? 2 : 1));
  for (int64_t i = 0; i < n; ++i) {
    const float x = normal(random) * size;
    if (type == DType::kFloat32) {
      std::memcpy(&bytes[i * 4], &x, 4);
    } else if (type == DType::kFloat16) {
      const auto step = static_cast<uint16_t>(std::lround(std::fabs(x) * 0x1p24f) & 0x3ff);
      const uint16_t bits = static_cast<uint16_t>(step | (x < 0 ? 0x8000 : 0));  // a subnormal
      std::memcpy(&bytes[i * 2], &bits, 2);
    } else {
      bytes[i] = static_cast<uint8_t>(random() & 0x83);  // a subnormal of both fp8 formats
    }
  }
  return bytes;
}

// All bits that the calls write. Inputs are made in the default mode.
std::vector<uint8_t> results(DType type, int64_t q_len, int threads) {
  std::mt19937 random(7);
  const bool fp8 = type != DType::kFloat32 && type != DType::kFloat16;
  const DType query_type = fp8 ? DType::kFloat32 : type;
  const int64_t element = query_type == DType::kFloat32 ? 4 : 2;
  const std::vector<uint8_t> q = numbers(random, DType::kFloat32, kHeads * q_len * kDim, 1.0f);
  std::vector<uint8_t> q16(q.size() / 2, 0x3c);  // about 1 in fp16
  std::vector<uint8_t> k = numbers(random, type, kKvHeads * kKeys * kDim, 0x1p-16f);
  std::vector<uint8_t> v = numbers(random, type, kKvHeads * kKeys * kDim, 0x1p-130f * 1e4f);
  std::vector<uint8_t> out(kHeads * q_len * kDim * element, 0xff);
  std::vector<float> lse(kHeads * q_len), scale(kKvHeads * kKeys, 1.0f), scale_v = scale;
  const int32_t length = kKeys - 4;
  AttentionParams p{};
  p.q = query_type == DType::kFloat32 ? q.data() : q16.data();
  p.k = k.data();
  p.v = v.data();
  p.out = out.data();
  p.lse = lse.data();
  p.dtype = query_type;
  p.k_dtype = p.v_dtype = type;
  p.batch = p.num_pages = p.max_pages = 1;
  p.num_heads = kHeads;
  p.num_k_heads = p.num_v_heads = kKvHeads;
  p.q_len = p.q_tokens = q_len;
  p.kv_len = p.page_size = kKeys;
  p.head_dim = p.value_head_dim = kDim;
  p.q_stride = p.out_stride = {kHeads * q_len * kDim, q_len * kDim, kDim};
  p.k_stride = p.v_stride = {kKvHeads * kKeys * kDim, kKeys * kDim, kDim};
  p.head_map = kMap.data();
  p.kv_lengths = &length;
  p.scale = 0.125f;
  p.window_left = p.window_right = -1;
  if (fp8) {
    p.k_scale = scale.data();
    p.v_scale = scale_v.data();
    p.k_scale_stride = p.v_scale_stride = {kKvHeads * kKeys, kKeys, 1};
  }
  const cpu::ThreadPool pool{threads, run_on_threads};
  call_in_mode([&] { cpu::attention_forward(p, pool); });

  std::vector<uint8_t> all = out;
  const auto add = [&all](const auto& x) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(x.data());
    all.insert(all.end(), bytes, bytes + x.size() * sizeof(x[0]));
  };
  add(lse);
  if (!fp8) {
    std::vector<uint8_t> dq(out.size()), dk(k.size()), dv(v.size()), dout = out;
    BackwardParams backward{};
    backward.call = p;
    backward.dout = dout.data();
    backward.dq = dq.data();
    backward.dk = dk.data();
    backward.dv = dv.data();
    backward.dout_stride = backward.dq_stride = p.q_stride;
    backward.dk_stride = backward.dv_stride = p.k_stride;
    call_in_mode([&] { cpu::attention_backward(backward, pool); });
    for (const auto* x : {&dq, &dk, &dv}) add(*x);
  }
  AppendParams append{};
  append.cache = p;
  append.dtype = DType::kFloat32;
  append.k = k.data();
  append.v = v.data();
  append.k_dynamic = append.v_dynamic = fp8;
  if (fp8) append.k_scale = scale.data(), append.v_scale = scale_v.data();
  append.num_tokens = 4;
  const std::vector<uint8_t> tokens =
      numbers(random, DType::kFloat32, kKvHeads * append.num_tokens * kDim, 0x1p-126f);
  append.k_new = append.v_new = tokens.data();
  append.k_new_stride = append.v_new_stride = {kKvHeads * 4 * kDim, 4 * kDim, kDim};
  if (type != DType::kFloat16) {  // tokens have the type of a plain cache
    call_in_mode([&] { cpu::cache_append(append, pool); });
    for (const auto* x : {&k, &v}) add(*x);
    for (const auto* x : {&scale, &scale_v}) add(*x);
  }
  return all;
}

}  // namespace

int main() {
  int wrong = 0;
  const char* kernels[][2] = {{"portable", ""},   {"neon", ""},        {"avx2", "cheap"},
                              {"avx2", "costly"}, {"avx512", "cheap"}, {"avx512", "costly"}};
  for (const auto& [isa, subnormals] : kernels) {
    setenv("GQA_KERNELS_CPU_ISA", isa, 1);
    setenv("GQA_KERNELS_CPU_SUBNORMALS", subnormals, 1);
    try {
      cpu::chosen_isa();
    } catch (const std::invalid_argument&) {
      std::printf("%s: not on this processor\n", isa);
      continue;
    }
    for (DType type : {DType::kFloat32, DType::kFloat16, DType::kFloat8E4M3, DType::kFloat8E5M2}) {
      for (int64_t q_len : {1, 30}) {
        for (int threads : {1, 2, 5}) {
          const std::vector<uint8_t> expected = results(type, q_len, threads);
          strange = true;
          const std::vector<uint8_t> found = results(type, q_len, threads);
          strange = false;
          if (found == expected) continue;
          std::printf("%s %s: type %d, %d queries, %d threads: other bits in a strange mode\n", isa,
                      subnormals, static_cast<int>(type), static_cast<int>(q_len), threads);
          ++wrong;
        }
      }
    }
  }
  if (modes_lost > 0) std::printf("%d threads came back in another mode\n", modes_lost);
  wrong += modes_lost;
  std::printf(wrong ? "%d wrong\n" : "ok\n", wrong);
  return wrong ? EXIT_FAILURE : EXIT_SUCCESS;
}
