// The CPU kernels against the formula written as loops in double precision, for every instruction
// set of this processor, on random shapes and options. Without Torch, so that sanitizers see every
// access.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "core/params.h"
#include "cpu/forward/attention.h"
#include "cpu/isa/cpu_features.h"

namespace {

using gqa::AttentionParams;
using gqa::DType;
using gqa::Strides;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

void run_on_threads(int64_t n, void (*body)(void*, int64_t), void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < n; ++i) threads.emplace_back(body, context, i);
  if (n > 0) body(context, 0);
  for (std::thread& thread : threads) thread.join();
}

// A number as `dtype` holds it: fp32 bits cut to bf16, or an fp16 of few bits, both exact when
// widened again.
class Storage {
 public:
  Storage(DType dtype, int64_t n) : dtype_(dtype), bytes_(n * size()) {}

  int64_t size() const { return dtype_ == DType::kFloat32 ? 4 : 2; }
  void* data() { return bytes_.data(); }
  int64_t count() const { return static_cast<int64_t>(bytes_.size()) / size(); }

  void set(int64_t i, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (dtype_ == DType::kFloat32) {
      std::memcpy(&bytes_[i * 4], &bits, 4);
      return;
    }
    uint16_t half = static_cast<uint16_t>(bits >> 16);
    if (dtype_ == DType::kFloat16) {
      half = static_cast<uint16_t>((bits >> 16) & 0x8000);
      if (std::isnan(x)) {
        half |= 0x7e00;
      } else if (x != 0.0f) {
        half |= static_cast<uint16_t>(((bits & 0x7fffffff) - 0x38000000) >> 13);
      }
    }
    std::memcpy(&bytes_[i * 2], &half, 2);
  }

  float get(int64_t i) const {
    if (dtype_ == DType::kFloat32) {
      float x;
      std::memcpy(&x, &bytes_[i * 4], 4);
      return x;
    }
    uint16_t half;
    std::memcpy(&half, &bytes_[i * 2], 2);
    if (dtype_ == DType::kBFloat16) {
      const uint32_t bits = static_cast<uint32_t>(half) << 16;
      float x;
      std::memcpy(&x, &bits, 4);
      return x;
    }
    const int exponent = (half >> 10) & 31, fraction = half & 1023;
    const float sign = half & 0x8000 ? -1.0f : 1.0f;
    if (exponent == 31) return fraction ? kNaN : sign * INFINITY;
    return sign * (exponent ? std::ldexp(1024.0f + fraction, exponent - 25)
                            : std::ldexp(1.0f * fraction, -24));
  }

 private:
  DType dtype_;
  std::vector<char> bytes_;
};

struct Tensor {  // [B, H, S, D], heads before tokens or within them; gaps between rows hold NaN
  Storage storage;
  Strides strides;
  int64_t dims;

  Tensor(DType dtype, int64_t b, int64_t h, int64_t s, int64_t d, int64_t gap,
         bool within_tokens = false)
      : storage(dtype, b * h * s * (d + gap) + 1),
        strides{h * s * (d + gap), (within_tokens ? 1 : s) * (d + gap),
                (within_tokens ? h : 1) * (d + gap)},
        dims(d) {
    for (int64_t i = 0; i < storage.count(); ++i) storage.set(i, kNaN);
  }
  std::vector<float> widened() const {
    std::vector<float> values(storage.count());
    for (int64_t i = 0; i < storage.count(); ++i) values[i] = storage.get(i);
    return values;
  }
  int64_t at(int64_t b, int64_t h, int64_t s, int64_t d) const {
    return b * strides.b + h * strides.h + s * strides.s + d;
  }
};

struct Case {
  AttentionParams p{};
  Tensor q, k, v, out;
  std::vector<float> lse, slopes, sinks, float_mask;
  std::vector<uint8_t> bool_mask;
  std::vector<int32_t> map, value_map, lengths;
  std::string text;
};

void fill(Tensor& x, int64_t b, int64_t h, int64_t s, std::mt19937& random) {
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < b; ++i)
    for (int64_t j = 0; j < h; ++j)
      for (int64_t t = 0; t < s; ++t)
        for (int64_t d = 0; d < x.dims; ++d) {
          const float value = std::round(normal(random) * 64) / 64;  // exact in every dtype's range
          x.storage.set(x.at(i, j, t, d), value);
        }
}

// rows: 0, or query tokens of a bf16 call with one query head and no window, whose tasks have so
// many rows.
Case make_case(std::mt19937& random, int64_t rows = 0) {
  const auto pick = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  const auto coin = [&](int one_in) { return pick(1, one_in) == 1; };
  AttentionParams p{};
  p.dtype = static_cast<DType>(pick(0, 2));
  p.batch = pick(1, 2);
  p.num_heads = pick(1, 9);
  p.num_k_heads = pick(1, 4);
  const bool own_value_map = coin(4);
  p.num_v_heads = own_value_map ? pick(1, 4) : p.num_k_heads;
  p.q_len = coin(2) ? pick(1, 4) : pick(1, 130);
  p.kv_len = coin(3) ? pick(0, 20) : pick(1, 700);
  if (p.q_len <= 4 && coin(6)) p.kv_len = pick(700, 1500);  // long enough to be split
  p.head_dim = coin(2) ? 64 : pick(1, 256);
  p.value_head_dim = coin(2) ? p.head_dim : pick(1, 256);
  p.scale = 1.0f / std::sqrt(static_cast<float>(p.head_dim));
  p.window_left = coin(4) ? pick(0, 90) : -1;
  p.window_right = coin(3) ? 0 : coin(4) ? pick(0, 20) : -1;
  p.softcap = coin(5) ? 2.0f : 0.0f;
  if (rows > 0) {
    p.dtype = DType::kBFloat16;
    p.batch = p.num_heads = p.num_k_heads = p.num_v_heads = 1;
    p.q_len = rows;
    p.kv_len = pick(rows, 200);
    p.window_left = p.window_right = -1;
  }

  Case c{p,
         Tensor(p.dtype, p.batch, p.num_heads, p.q_len, p.head_dim, pick(0, 3), coin(2)),
         Tensor(p.dtype, p.batch, p.num_k_heads, p.kv_len, p.head_dim, pick(0, 3), coin(2)),
         Tensor(p.dtype, p.batch, p.num_v_heads, p.kv_len, p.value_head_dim, pick(0, 3), coin(2)),
         Tensor(p.dtype, p.batch, p.num_heads, p.q_len, p.value_head_dim, pick(0, 3), coin(2)),
         {},
         {},
         {},
         {},
         {},
         {},
         {},
         {},
         {}};
  fill(c.q, p.batch, p.num_heads, p.q_len, random);
  fill(c.k, p.batch, p.num_k_heads, p.kv_len, random);
  fill(c.v, p.batch, p.num_v_heads, p.kv_len, random);
  c.lse.assign(p.batch * p.num_heads * p.q_len, 12345.0f);
  for (int64_t h = 0; h < p.num_heads; ++h) {
    c.map.push_back(static_cast<int32_t>(coin(20) ? -7 : pick(0, p.num_k_heads - 1)));
    if (own_value_map)
      c.value_map.push_back(static_cast<int32_t>(coin(20) ? 99 : pick(0, p.num_v_heads - 1)));
    c.slopes.push_back(static_cast<float>(pick(0, 40)) / 64);
    c.sinks.push_back(static_cast<float>(pick(-40, 40)) / 16);
  }
  if (coin(3)) {
    for (int64_t i = 0; i < p.batch * p.num_k_heads; ++i) {
      c.lengths.push_back(static_cast<int32_t>(pick(-1, p.kv_len + 1)));
    }
  }
  if (!coin(4)) c.slopes.clear();
  if (!coin(4)) c.sinks.clear();
  const int64_t mask_size = p.q_len * p.kv_len;
  if (coin(5)) {
    for (int64_t i = 0; i < mask_size; ++i) c.bool_mask.push_back(!coin(4));
  } else if (coin(5)) {
    for (int64_t i = 0; i < mask_size; ++i) {
      c.float_mask.push_back(coin(6) ? -INFINITY : static_cast<float>(pick(-64, 64)) / 32);
    }
  }
  return c;
}

void point_to_tensors(Case& c) {
  AttentionParams& p = c.p;
  p.q = c.q.storage.data();
  p.k = c.k.storage.data();
  p.v = c.v.storage.data();
  p.out = c.out.storage.data();
  p.lse = c.lse.data();
  p.k_dtype = p.v_dtype = p.dtype;
  p.num_pages = p.batch;
  p.page_size = p.kv_len;
  p.max_pages = 1;
  p.q_tokens = p.q_len;
  p.q_stride = c.q.strides;
  p.k_stride = c.k.strides;
  p.v_stride = c.v.strides;
  p.out_stride = c.out.strides;
  p.head_map = c.map.data();
  p.value_head_map = c.value_map.empty() ? nullptr : c.value_map.data();
  p.alibi_slopes = c.slopes.empty() ? nullptr : c.slopes.data();
  p.alibi_stride_h = 1;
  p.sinks = c.sinks.empty() ? nullptr : c.sinks.data();
  p.kv_lengths = c.lengths.empty() ? nullptr : c.lengths.data();
  p.kv_lengths_stride_b = p.num_k_heads;
  p.kv_lengths_stride_h = 1;
  if (!c.bool_mask.empty()) {
    p.attn_mask = c.bool_mask.data();
    p.mask_dtype = DType::kBool;
  } else if (!c.float_mask.empty()) {
    p.attn_mask = c.float_mask.data();
    p.mask_dtype = DType::kFloat32;
  }
  p.mask_stride_q = p.kv_len;
  p.mask_stride_k = 1;
}

struct Widened {
  std::vector<float> q, k, v;
};

// The formula of gqa_kernels/backends/reference/formula.py for one row. Returns the LSE.
double reference_row(const Case& c, const Widened& x, int64_t b, int64_t h, int64_t i,
                     std::vector<double>& out) {
  const AttentionParams& p = c.p;
  const int64_t kh = c.map[h], vh = c.value_map.empty() ? kh : c.value_map[h];
  out.assign(p.value_head_dim, NAN);
  if (kh < 0 || kh >= p.num_k_heads || vh < 0 || vh >= p.num_v_heads) return NAN;
  int64_t n = p.kv_len;
  if (!c.lengths.empty())
    n = std::min<int64_t>(std::max<int64_t>(c.lengths[b * p.num_k_heads + kh], 0), n);
  const int64_t position = i + n - p.q_len;
  std::vector<double> score(n, -INFINITY);
  double max = -INFINITY;
  for (int64_t j = 0; j < n; ++j) {
    if (p.window_left >= 0 && j < position - p.window_left) continue;
    if (p.window_right >= 0 && j > position + p.window_right) continue;
    if (!c.bool_mask.empty() && !c.bool_mask[i * p.kv_len + j]) continue;
    double s = 0;
    for (int64_t d = 0; d < p.head_dim; ++d) {
      s += static_cast<double>(x.q[c.q.at(b, h, i, d)]) * x.k[c.k.at(b, kh, j, d)];
    }
    s *= p.scale;
    if (p.softcap != 0) s = p.softcap * std::tanh(s / p.softcap);
    if (!c.slopes.empty()) s -= c.slopes[h] * std::fabs(static_cast<double>(position - j));
    if (!c.float_mask.empty()) s += c.float_mask[i * p.kv_len + j];
    score[j] = s;
    max = std::max(max, s);
  }
  out.assign(p.value_head_dim, 0.0);
  if (max == -INFINITY) return -INFINITY;
  double sum = c.sinks.empty() ? 0 : std::exp(c.sinks[h] - max);
  for (int64_t j = 0; j < n; ++j) sum += std::exp(score[j] - max);
  for (int64_t j = 0; j < n; ++j) {
    const double weight = std::exp(score[j] - max) / sum;
    if (weight == 0) continue;
    for (int64_t d = 0; d < p.value_head_dim; ++d) out[d] += weight * x.v[c.v.at(b, vh, j, d)];
  }
  return max + std::log(sum);
}

bool near(double got, double expected, double tolerance) {
  if (std::isnan(expected) || std::isinf(expected)) {
    return std::isnan(expected) ? std::isnan(got) : got == expected;
  }
  return std::fabs(got - expected) <= tolerance;
}

// Number of wrong elements.
int check_case(Case& c, const char* isa, int threads, unsigned seed) {
  const AttentionParams& p = c.p;
  point_to_tensors(c);
  gqa::cpu::attention_forward(p, {threads, run_on_threads});
  // Values are about 1 to 4: fp32 sums of up to 1500 terms; bf16 and fp16 round P and the output.
  const double tolerance = p.dtype == DType::kFloat32    ? 2e-5
                           : p.dtype == DType::kBFloat16 ? 3e-2
                                                         : 4e-3;
  int wrong = 0;
  const Widened widened{c.q.widened(), c.k.widened(), c.v.widened()};
  std::vector<double> expected;
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t h = 0; h < p.num_heads; ++h)
      for (int64_t i = 0; i < p.q_len; ++i) {
        const double lse = reference_row(c, widened, b, h, i, expected);
        const float got_lse = c.lse[(b * p.num_heads + h) * p.q_len + i];
        if (!near(got_lse, lse, 2e-5) && ++wrong <= 3) {
          std::printf("%s seed %u threads %d: lse[%d,%d,%d] = %g, expected %g\n", isa, seed,
                      threads, static_cast<int>(b), static_cast<int>(h), static_cast<int>(i),
                      got_lse, lse);
        }
        for (int64_t d = 0; d < p.value_head_dim; ++d) {
          const float got = c.out.storage.get(c.out.at(b, h, i, d));
          if (!near(got, expected[d], tolerance) && ++wrong <= 3) {
            std::printf("%s seed %u threads %d: out[%d,%d,%d,%d] = %g, expected %g\n", isa, seed,
                        threads, static_cast<int>(b), static_cast<int>(h), static_cast<int>(i),
                        static_cast<int>(d), got, expected[d]);
          }
        }
      }
  return wrong;
}

// K or V of a case in pages, in the order of `table` [B, pages per sequence]; NaN in between.
Tensor in_pages(const Case& c, const Tensor& dense, int64_t heads, int64_t page_size,
                const std::vector<int32_t>& table) {
  const int64_t pages = static_cast<int64_t>(table.size()) / c.p.batch;
  Tensor paged(c.p.dtype, static_cast<int64_t>(table.size()), heads, page_size, dense.dims, 1);
  for (int64_t b = 0; b < c.p.batch; ++b)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t key = 0; key < c.p.kv_len; ++key)
        for (int64_t d = 0; d < dense.dims; ++d) {
          const float value = dense.storage.get(dense.at(b, h, key, d));
          const int32_t page = table[b * pages + key / page_size];
          paged.storage.set(paged.at(page, h, key % page_size, d), value);
        }
  return paged;
}

// Whether the same K and V in shuffled pages give the same bits. (On one thread: on several, keys
// may be cut elsewhere.)
bool pages_change_nothing(Case& c, unsigned seed) {
  if (c.p.kv_len == 0) return true;
  constexpr int threads = 1;
  gqa::cpu::attention_forward(c.p, {threads, run_on_threads});
  std::mt19937 random(seed);
  const int64_t page_size = seed % 4 == 0 ? 16 : 1 + random() % 40;
  const int64_t pages = (c.p.kv_len + page_size - 1) / page_size;
  std::vector<int32_t> table(c.p.batch * pages);
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i);
  std::shuffle(table.begin(), table.end(), random);

  Tensor k = in_pages(c, c.k, c.p.num_k_heads, page_size, table);
  Tensor v = in_pages(c, c.v, c.p.num_v_heads, page_size, table);
  Tensor out = c.out;
  for (int64_t i = 0; i < out.storage.count(); ++i) out.storage.set(i, kNaN);
  std::vector<float> lse(c.lse.size());
  AttentionParams p = c.p;
  p.k = k.storage.data();
  p.v = v.storage.data();
  p.out = out.storage.data();
  p.lse = lse.data();
  p.k_stride = k.strides;
  p.v_stride = v.strides;
  p.page_table = table.data();
  p.page_table_stride_b = pages;
  p.page_table_stride_h = 0;
  p.page_table_stride_p = 1;
  p.num_pages = static_cast<int64_t>(table.size());
  p.page_size = page_size;
  p.max_pages = pages;
  gqa::cpu::attention_forward(p, {threads, run_on_threads});
  Tensor expected = c.out;
  return std::memcmp(out.storage.data(), expected.storage.data(),
                     out.storage.count() * out.storage.size()) == 0 &&
         std::memcmp(lse.data(), c.lse.data(), lse.size() * sizeof(float)) == 0;
}

// The type for which an instruction set has kernels, if it is one alone.
std::optional<DType> only_type(gqa::cpu::Isa isa) {
  using gqa::cpu::Isa;
  switch (isa) {
    case Isa::kNeonFhm: return DType::kFloat16;
    case Isa::kNeonBf16:
    case Isa::kAvx512Bf16:
    case Isa::kAmx: return DType::kBFloat16;
    default: return std::nullopt;
  }
}

}  // namespace

int main(int argc, char** argv) {
  const unsigned cases = argc > 1 ? std::atoi(argv[1]) : 80;
  int wrong = 0;
  for (const char* isa :
       {"portable", "neon", "neon_fhm", "neon_bf16", "avx2", "avx512", "avx512_bf16", "amx"}) {
    setenv("GQA_KERNELS_CPU_ISA", isa, 1);
    try {
      gqa::cpu::chosen_isa();
    } catch (const std::invalid_argument&) {
      std::printf("%s: not on this processor\n", isa);
      continue;
    }
    // Some have kernels of their own for one type alone.
    const std::optional<DType> only = only_type(gqa::cpu::chosen_isa());
    unsigned checked = 0;
    for (unsigned seed = 0; checked < (only ? cases / 2 : cases); ++seed) {
      std::mt19937 random(seed);
      Case c = make_case(random);
      if (only && c.p.dtype != *only) continue;
      ++checked;
      const int threads = seed % 3 == 0 ? 1 : 5;
      wrong += check_case(c, isa, threads, seed);
      if (!pages_change_nothing(c, seed)) {
        std::printf("%s seed %u: pages changed the result\n", isa, seed);
        ++wrong;
      }
    }
    // Around the ends of strips and tiles of rows, which random cases may all miss.
    for (const int rows : {6, 7, 16, 17, 18, 32, 33, 49}) {
      std::mt19937 random(rows);
      Case c = make_case(random, rows);
      c.map = {0};
      c.value_map.clear();
      c.lengths.clear();
      wrong += check_case(c, isa, 1, rows);
    }
    std::printf("%s: %u cases\n", isa, checked);
  }
  std::printf(wrong ? "%d wrong\n" : "ok\n", wrong);
  return wrong ? EXIT_FAILURE : EXIT_SUCCESS;
}
