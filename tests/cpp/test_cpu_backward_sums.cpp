// Parts of a KV head come together in one order, whatever order they finish in, and no more of them
// are in memory than work is under way.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "cpu/backward/backward.h"
#include "cpu/backward/sums.h"

namespace {

std::atomic<int64_t> live_bytes{0}, peak_bytes{0};
constexpr int64_t kHeader = 64;  // bytes before each allocation; they hold its size

}  // namespace

// AlignedFloats, and nothing else here, takes memory that is aligned to cache lines.
void* operator new(size_t size, std::align_val_t) {
  char* block = static_cast<char*>(std::aligned_alloc(kHeader, (size + 2 * kHeader) / 64 * 64));
  if (block == nullptr) throw std::bad_alloc();
  std::memcpy(block, &size, sizeof(size));
  const int64_t live = live_bytes += static_cast<int64_t>(size);
  for (int64_t peak = peak_bytes; live > peak && !peak_bytes.compare_exchange_weak(peak, live);) {
  }
  return block + kHeader;
}
void operator delete(void* data, std::align_val_t) noexcept {
  if (data == nullptr) return;
  char* block = static_cast<char*>(data) - kHeader;
  size_t size;
  std::memcpy(&size, block, sizeof(size));
  live_bytes -= static_cast<int64_t>(size);
  std::free(block);
}
void operator delete(void* data, size_t, std::align_val_t alignment) noexcept {
  operator delete(data, alignment);
}

namespace {

using namespace gqa;
using namespace gqa::cpu;

// Parts of one head with keys like these; part 0 has all.
std::vector<BackwardTask> make_parts(const std::vector<std::pair<int64_t, int64_t>>& keys,
                                     bool wants_keys, bool wants_values) {
  std::vector<BackwardTask> parts;
  for (const auto& [begin, end] : keys) {
    BackwardTask task{};
    task.k_head = wants_keys ? 0 : -1;
    task.v_head = wants_values ? 0 : -1;
    task.key_begin = begin;
    task.key_end = end;
    task.part = static_cast<int32_t>(parts.size());
    task.num_parts = static_cast<int32_t>(keys.size());
    parts.push_back(task);
  }
  return parts;
}

std::vector<float> random_floats(int64_t n, std::mt19937& random) {
  std::vector<float> x(n);
  for (float& value : x) value = std::normal_distribution<float>()(random);
  return x;
}

AlignedFloats copy_of(const std::vector<float>& x) {
  AlignedFloats copy;
  copy.reserve(static_cast<int64_t>(x.size()));
  std::copy(x.begin(), x.end(), copy.get());
  return copy;
}

// Every order of finishing, one after another, or all at once.
int check_orders(const std::vector<BackwardTask>& parts, bool at_once) {
  const SumWidths widths{16, 32};
  const SumWidths own = widths.of(parts[0]);
  std::mt19937 random(1);
  std::vector<std::vector<float>> sums;
  for (const BackwardTask& part : parts)
    sums.push_back(random_floats(sum_floats(part, widths), random));

  std::vector<float> expected = sums[0];
  for (const BackwardTask& part : parts) {
    if (part.part == 0) continue;
    const float* from = sums[part.part].data();
    for (const auto& [width, first] :
         {std::pair{own.dk, int64_t{0}}, {own.dv, sum_keys(parts[0]) * own.dk}}) {
      float* to = &expected[first] + (part.key_begin - parts[0].key_begin) * width;
      for (int64_t i = 0; i < (part.key_end - part.key_begin) * width; ++i) to[i] += from[i];
      from += sum_keys(part) * width;
    }
  }

  int wrong = 0;
  const auto compare = [&](PartSums& head) {
    const int64_t keys = parts[0].key_end - parts[0].key_begin;  // the rest are strips' ends
    const float *found = head.total().get(), *second = &expected[sum_keys(parts[0]) * own.dk];
    wrong += std::memcmp(found, expected.data(), keys * own.dk * 4) != 0;
    wrong += std::memcmp(found + sum_keys(parts[0]) * own.dk, second, keys * own.dv * 4) != 0;
  };
  std::vector<size_t> order(parts.size());
  std::iota(order.begin(), order.end(), 0);
  do {
    PartSums head;
    head.start(parts.data(), widths);
    for (const size_t i : order) {
      AlignedFloats memory = copy_of(sums[i]);
      wrong += head.add(parts[i], memory) != (i == order.back());
    }
    compare(head);
  } while (!at_once && std::next_permutation(order.begin(), order.end()));
  for (int repeat = 0; at_once && repeat < 20; ++repeat) {
    PartSums head;
    head.start(parts.data(), widths);
    std::atomic<int> completed{0};
    std::vector<std::thread> threads;
    for (const BackwardTask& part : parts) {
      threads.emplace_back([&] {
        AlignedFloats memory = copy_of(sums[part.part]);
        completed += head.add(part, memory);
      });
    }
    for (std::thread& thread : threads) thread.join();
    wrong += completed != 1;
    compare(head);
  }
  return wrong;
}

// Most memory that a call on one KV head takes, with workers that run one after another.
int64_t peak_of_call(int threads) {
  constexpr int64_t kHeads = 4, kTokens = 400, kDim = 64;
  const std::vector<float> in(kHeads * kTokens * kDim, 0.1f), lse(kHeads * kTokens, 6.0f);
  std::vector<float> dq(in.size()), dk(kTokens * kDim), dv(kTokens * kDim);
  const std::vector<int32_t> map(kHeads, 0);
  BackwardParams params{};
  AttentionParams& call = params.call;
  call.batch = call.num_k_heads = call.num_v_heads = call.num_pages = call.max_pages = 1;
  call.num_heads = kHeads;
  call.q_len = call.kv_len = call.q_tokens = call.page_size = kTokens;
  call.head_dim = call.value_head_dim = kDim;
  call.scale = 0.125f;
  call.window_left = -1;
  call.head_map = map.data();
  call.q = call.k = call.v = params.dout = in.data();
  call.out = const_cast<float*>(in.data());
  call.lse = const_cast<float*>(lse.data());
  params.dq = dq.data();
  params.dk = dk.data();
  params.dv = dv.data();
  const Strides strides{kHeads * kTokens * kDim, kTokens * kDim, kDim};
  for (Strides* s : {&call.q_stride, &call.k_stride, &call.v_stride, &call.out_stride,
                     &params.dout_stride, &params.dq_stride, &params.dk_stride, &params.dv_stride})
    *s = strides;
  peak_bytes = live_bytes.load();
  const int64_t before = live_bytes;
  attention_backward(params, {threads, [](int64_t n, void (*body)(void*, int64_t), void* context) {
                                for (int64_t i = 0; i < n; ++i) body(context, i);
                              }});
  return live_bytes == before ? peak_bytes - before : INT64_MAX;
}

}  // namespace

int main() {
  int wrong = 0;
  const std::vector<std::pair<int64_t, int64_t>> long_parts(6, {0, 8000});
  wrong +=
      check_orders(make_parts({{0, 30}, {0, 12}, {10, 25}, {12, 30}, {7, 7}}, true, true), false);
  wrong += check_orders(make_parts({{5, 20}, {5, 5}, {9, 20}}, true, false), false);
  wrong += check_orders(make_parts({{0, 9}, {3, 9}, {0, 9}, {1, 2}}, false, true), false);
  wrong += check_orders(make_parts(long_parts, true, true), true);
  const int64_t whole = peak_of_call(1), parts = peak_of_call(5);
  const int64_t sums = (400 + 8) * (64 + 64) * 4;
  std::printf("peak of a KV head: whole %lld bytes, in parts %lld\n", static_cast<long long>(whole),
              static_cast<long long>(parts));
  wrong += whole <= sums || parts <= whole || parts > whole + sums;
  std::printf(wrong ? "%d wrong\n" : "ok\n", wrong);
  return wrong ? EXIT_FAILURE : EXIT_SUCCESS;
}
