// What bounds decode on this processor: nanoseconds a key of one KV head takes on one thread, by
// format, page size, group size and the memory in which K and V lie, beside a loop that only reads
// the same bytes in the same order. If K and V lie in memory and both times agree, memory bounds
// decode. If all keys lie in a near cache, instructions do.
//
//   cmake -S . -B build/cpp && cmake --build build/cpp --target decode_bounds
//   taskset -c 0 build/cpp/decode_bounds [text: only rows whose line has it, such as int8]
//
// K and V lie in huge pages where the operating system gives them, as those of the package's own
// caches do; `--small-pages` measures without.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "core/params.h"
#include "cpu/forward/attention.h"
#include "cpu/isa/cpu_features.h"

namespace {

using namespace gqa;

constexpr int kHeadDim = 128;
constexpr double kSeconds = 0.05;  // of a sample
constexpr int kSamples = 7;

struct Format {
  const char* name;
  DType type;
  int row_bytes;
};
constexpr Format kFormats[] = {
    {"fp32", DType::kFloat32, 512}, {"bf16", DType::kBFloat16, 256},
    {"fp16", DType::kFloat16, 256}, {"fp8_e4m3", DType::kFloat8E4M3, 128},
    {"int8", DType::kInt8, 128},    {"int4", DType::kInt4, 64}};

bool huge_pages = true;

// As std::allocator, at a multiple of 2 MiB and with advice for huge pages.
template <class T>
struct PageAllocator {
  using value_type = T;
  PageAllocator() = default;
  template <class U>
  PageAllocator(const PageAllocator<U>&) {}
  T* allocate(size_t n) {
    constexpr size_t kPage = size_t{1} << 21;
    const size_t bytes = (n * sizeof(T) + kPage - 1) / kPage * kPage;
    void* p = std::aligned_alloc(kPage, bytes);
#if defined(__linux__)
    madvise(p, bytes, huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#endif
    return static_cast<T*>(p);
  }
  void deallocate(T* p, size_t) { std::free(p); }
  bool operator==(const PageAllocator&) const { return true; }
  bool operator!=(const PageAllocator&) const { return false; }
};
using Bytes = std::vector<uint8_t, PageAllocator<uint8_t>>;

double now() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

// Seconds of each of `runs`, which take turns: medians.
std::vector<double> time_in_turn(const std::vector<std::function<void()>>& runs) {
  std::vector<std::vector<double>> seconds(runs.size());
  std::vector<int> calls(runs.size(), 1);
  for (size_t i = 0; i < runs.size(); ++i) {
    for (runs[i]();; calls[i] *= 2) {
      const double start = now();
      for (int n = 0; n < calls[i]; ++n) runs[i]();
      if (now() - start > kSeconds / 2) break;
    }
  }
  for (int sample = 0; sample < kSamples; ++sample) {
    for (size_t i = 0; i < runs.size(); ++i) {
      const double start = now();
      for (int n = 0; n < calls[i]; ++n) runs[i]();
      seconds[i].push_back((now() - start) / calls[i]);
    }
  }
  std::vector<double> medians;
  for (auto& s : seconds) {
    std::nth_element(s.begin(), s.begin() + kSamples / 2, s.end());
    medians.push_back(s[kSamples / 2]);
  }
  return medians;
}

const cpu::ThreadPool kOneThread{1, [](int64_t n, void (*body)(void*, int64_t), void* context) {
                                   for (int64_t i = 0; i < n; ++i) body(context, i);
                                 }};

// One sequence and decode step; pages are in random order. Layout [page, head, slot, D].
class Problem {
 public:
  Problem(const Format& format, int group, int64_t heads, int64_t keys, int64_t page_size)
      : format_(format), heads_(heads), keys_(keys) {
    const int64_t slots = page_size ? page_size : keys, pages = keys / slots;
    const int64_t bytes = pages * heads * slots * format.row_bytes;
    std::mt19937 random(0);
    k_.resize(bytes), v_.resize(bytes);
    for (auto* x : {&k_, &v_}) fill(*x, random);
    scales_.assign(pages * heads * slots, 0.01f);
    table_.resize(pages);
    std::iota(table_.begin(), table_.end(), 0);
    std::shuffle(table_.begin(), table_.end(), random);
    const int64_t num_heads = heads * group;
    const bool fp32 = format.type == DType::kFloat32, fp16 = format.type == DType::kFloat16;
    q_.assign(num_heads * kHeadDim * 2, fp16 ? 0x2e66 : 0x3dcd);  // 0.1
    if (fp32) {
      for (int64_t i = 0; i < num_heads * kHeadDim; ++i) {
        const float x = 0.1f;
        std::memcpy(q_.data() + 2 * i, &x, 4);
      }
    }
    out_.resize(q_.size());
    lse_.resize(num_heads);
    for (int64_t h = 0; h < num_heads; ++h) map_.push_back(static_cast<int32_t>(h / group));
    params_ = AttentionParams{};
    params_.q = q_.data(), params_.k = k_.data(), params_.v = v_.data();
    params_.out = out_.data(), params_.lse = lse_.data();
    params_.q_stride = params_.out_stride = {num_heads * kHeadDim, kHeadDim, kHeadDim};
    const int64_t row = format.row_bytes * 8 / bits();  // in elements of storage
    params_.k_stride = params_.v_stride = {heads * slots * row, slots * row, row};
    params_.head_map = map_.data();
    params_.batch = 1, params_.num_heads = num_heads;
    params_.num_k_heads = params_.num_v_heads = heads;
    params_.q_len = params_.q_tokens = 1, params_.kv_len = keys;
    params_.head_dim = params_.value_head_dim = kHeadDim;
    params_.scale = 0.088f, params_.window_left = params_.window_right = -1;
    const bool quantized = is_quantized(format.type);
    params_.dtype = quantized ? DType::kBFloat16 : format.type;
    params_.k_dtype = params_.v_dtype = format.type;
    params_.num_pages = pages, params_.page_size = slots, params_.max_pages = pages;
    if (page_size) params_.page_table = table_.data(), params_.page_table_stride_p = 1;
    if (quantized) {
      params_.k_scale = params_.v_scale = scales_.data();
      params_.k_scale_stride = params_.v_scale_stride = {heads * slots, slots, 1};
    }
  }

  void attend() { cpu::attention_forward(params_, kOneThread, false); }

  // Reads what attend() reads: for 64 keys, or a page, head after head.
  void read() {
    const int64_t page_bytes = params_.page_size * format_.row_bytes;
    const int64_t pages = params_.num_pages;
    const int64_t turn = params_.page_size < 64 ? 64 / params_.page_size : 1;
    uint64_t sum = 0;
    for (int64_t first = 0; first < pages; first += turn) {
      for (int64_t h = 0; h < heads_; ++h) {
        for (int64_t p = first; p < std::min(first + turn, pages); ++p) {
          const int64_t offset = (table_[p] * heads_ + h) * page_bytes;
          sum += sum_of(k_.data() + offset, page_bytes) + sum_of(v_.data() + offset, page_bytes);
        }
      }
    }
    volatile uint64_t sink = sum;
    (void)sink;
  }

  double keys() const { return static_cast<double>(heads_ * keys_); }
  double bytes() const { return 2.0 * keys() * format_.row_bytes; }

 private:
  int bits() const {
    switch (format_.type) {
      case DType::kFloat32: return 32;
      case DType::kBFloat16:
      case DType::kFloat16: return 16;
      default: return 8;
    }
  }

  // Numbers of usual size, none of them NaN or subnormal.
  void fill(Bytes& bytes, std::mt19937& random) const {
    const int64_t step = bits() / 8;
    for (size_t i = 0; i < bytes.size(); ++i) {
      const uint8_t byte = static_cast<uint8_t>(random());
      const bool top = static_cast<int64_t>(i) % step == step - 1;  // sign and exponent
      const bool floats = format_.type != DType::kInt8 && format_.type != DType::kInt4;
      bytes[i] = top && floats ? static_cast<uint8_t>((byte & 0x80) | 0x38 | (byte & 7)) : byte;
    }
  }

  typedef uint64_t Pair __attribute__((vector_size(16)));
  static Pair load(const uint8_t* data) {
    Pair x;
    std::memcpy(&x, data, sizeof x);
    return x;
  }
  // 64 bytes a step, each 16 into a sum of its own.
  static uint64_t sum_of(const uint8_t* data, int64_t bytes) {
    Pair a{}, b{}, c{}, d{};
    for (const uint8_t* end = data + bytes; data < end; data += 64) {
      a += load(data), b += load(data + 16), c += load(data + 32), d += load(data + 48);
    }
    a += b + c + d;
    return a[0] + a[1];
  }

  Format format_;
  int64_t heads_, keys_;
  Bytes k_, v_;
  std::vector<uint16_t> q_, out_;
  std::vector<float> lse_, scales_;
  std::vector<int32_t> table_, map_;
  AttentionParams params_;
};

void measure(const std::string& only, const Format& format, int group, int64_t heads, int64_t keys,
             int64_t page_size) {
  char line[96];
  std::snprintf(line, sizeof line, "%-9s pages %-3ld group %-2d %ld x %-6ld", format.name,
                static_cast<long>(page_size), group, static_cast<long>(heads),
                static_cast<long>(keys));
  if (std::string(line).find(only) == std::string::npos) return;
  Problem problem(format, group, heads, keys, page_size);
  const auto t = time_in_turn({[&] { problem.attend(); }, [&] { problem.read(); }});
  std::printf("%s  %7.1f MiB %7.2f ns/key  read %6.2f  %5.1f GB/s of %5.1f\n", line,
              problem.bytes() / (1 << 20), t[0] / problem.keys() * 1e9, t[1] / problem.keys() * 1e9,
              problem.bytes() / t[0] / 1e9, problem.bytes() / t[1] / 1e9);
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  std::string only;
  for (int i = 1; i < argc; ++i) {
    if (std::string(argv[i]) == "--small-pages") {
      huge_pages = false;
    } else {
      only = argv[i];
    }
  }
  std::printf("kernels: %s, one thread, head dim %d, %s pages\n", cpu::isa_name(cpu::chosen_isa()),
              kHeadDim, huge_pages ? "huge" : "small");
  // In a second-level cache, a third-level one, and in memory alone.
  for (const auto& [heads, keys] : {std::pair<int64_t, int64_t>{1, 512}, {8, 8192}, {8, 65536}}) {
    for (int group : {1, 2, 4, 9}) {
      for (const Format& format : kFormats) measure(only, format, group, heads, keys, 0);
    }
    for (const Format& format : kFormats) measure(only, format, 4, heads, keys, 16);
  }
}
