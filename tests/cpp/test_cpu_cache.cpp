// Caches in the CPU kernels: pages of any size and stored numbers of every format against a dense
// fp32 cache of the same values, for every instruction set; and appends, read back. Memory is
// allocated to the byte, so that sanitizers see every access beyond it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "core/append_params.h"
#include "core/params.h"
#include "cpu/append/append.h"
#include "cpu/forward/attention.h"
#include "cpu/isa/cpu_features.h"

namespace {

using gqa::AppendParams;
using gqa::AttentionParams;
using gqa::DType;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

void run_on_threads(int64_t n, void (*body)(void*, int64_t), void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < n; ++i) threads.emplace_back(body, context, i);
  if (n > 0) body(context, 0);
  for (std::thread& thread : threads) thread.join();
}

// The value of a stored number, before zero and scale.
float number(DType dtype, uint8_t bits) {
  const float sign = bits & 0x80 ? -1.0f : 1.0f;
  if (dtype == DType::kFloat8E4M3 && (bits & 0x7f) == 0x7f) return kNaN;
  if (dtype == DType::kFloat8E5M2 && (bits & 0x7c) == 0x7c)
    return bits & 3 ? kNaN : sign * INFINITY;
  switch (dtype) {
    case DType::kFloat8E4M3: {
      const int exponent = bits >> 3 & 15, fraction = bits & 7;
      return sign * (exponent ? std::ldexp(8.0f + fraction, exponent - 10)
                              : std::ldexp(1.0f * fraction, -9));
    }
    case DType::kFloat8E5M2: {
      const int exponent = bits >> 2 & 31, fraction = bits & 3;
      return sign * (exponent ? std::ldexp(4.0f + fraction, exponent - 17)
                              : std::ldexp(1.0f * fraction, -16));
    }
    case DType::kInt8: return static_cast<int8_t>(bits);
    default: return bits;  // kInt4: one half
  }
}

// K or V: pages of bytes, scales and zeros; and the same numbers as a dense tensor.
struct Side {
  std::vector<uint8_t> bytes;      // [P, H, page_size, row_bytes]
  std::vector<float> scale, zero;  // [P, H, page_size]
  std::vector<float> dense;        // [B, H, slots, dims]
};

struct Case {
  DType format;
  int64_t batch, heads, page_size, max_pages, num_pages, dims[2];
  std::vector<int32_t> table, lengths, begin, map;  // table [B, H, max_pages]
  Side side[2];                                     // K, V
  bool zeros;
  bool specials;  // NaN and infinities of fp8 among the numbers
  bool shared;    // all heads have the same pages and lengths: tasks of a sequence run together
  std::vector<float> q, out, lse, dense_out, dense_lse;
  int64_t q_len, num_heads;

  int64_t slots() const { return page_size * max_pages; }
  int64_t row_bytes(int which) const {
    switch (format) {
      case DType::kFloat32: return dims[which] * 4;
      case DType::kInt4: return dims[which] / 2;
      default: return dims[which];
    }
  }
  int64_t row(int64_t page, int64_t h, int64_t slot) const {
    return (page * heads + h) * page_size + slot;
  }
};

Case make_case(std::mt19937& random) {
  const auto pick = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  Case c{};
  const DType formats[] = {DType::kFloat32, DType::kFloat8E4M3, DType::kFloat8E5M2, DType::kInt8,
                           DType::kInt4};
  c.format = formats[pick(0, 4)];
  c.batch = pick(1, 3);
  c.heads = pick(1, 3);
  c.page_size = pick(1, 3) == 1 ? 1 : pick(1, 40);
  c.max_pages = pick(1, 9);
  c.num_pages = c.batch * c.heads * c.max_pages + 2;
  for (int64_t& dims : c.dims) dims = pick(1, 4) == 1 ? 128 : 2 * pick(1, 70);
  c.zeros = pick(0, 1) && c.format != DType::kFloat32;
  c.shared = pick(0, 1);
  c.num_heads = pick(1, 7);
  c.q_len = pick(1, 2) == 1 ? 1 : pick(1, 30);
  const bool fp8 = c.format == DType::kFloat8E4M3 || c.format == DType::kFloat8E5M2;
  // All rows of one query see the same keys: to others, 0 * NaN is a matter of the order of work.
  c.specials = fp8 && c.q_len == 1 && pick(0, 1);

  std::vector<int32_t> pages(c.num_pages);
  std::iota(pages.begin(), pages.end(), 0);
  std::shuffle(pages.begin(), pages.end(), random);
  c.table.assign(pages.begin(), pages.end() - 2);
  for (int64_t b = 0; b < c.batch; ++b) {
    c.begin.push_back(static_cast<int32_t>(pick(0, c.slots())));
    for (int64_t h = 0; h < c.heads; ++h) {
      if (c.shared && h > 0) {
        const auto first = c.table.begin() + b * c.heads * c.max_pages;
        c.lengths.push_back(c.lengths.back());
        std::copy(first, first + c.max_pages, first + h * c.max_pages);
        continue;
      }
      c.lengths.push_back(static_cast<int32_t>(pick(0, c.slots() - c.begin[b])));
      // Beyond the length lie ids of no page.
      for (int64_t p = 0; p < c.max_pages; ++p) {
        if (p * c.page_size >= c.begin[b] + c.lengths.back())
          c.table[(b * c.heads + h) * c.max_pages + p] = 1 << 30;
      }
    }
  }
  for (int64_t h = 0; h < c.num_heads; ++h)
    c.map.push_back(static_cast<int32_t>(pick(0, c.heads - 1)));

  std::normal_distribution<float> normal;
  for (int which = 0; which < 2; ++which) {
    Side& side = c.side[which];
    const int64_t rows = c.num_pages * c.heads * c.page_size, dims = c.dims[which];
    side.bytes.resize(rows * c.row_bytes(which));
    side.scale.resize(rows);
    side.zero.resize(rows);
    std::vector<float> values(rows * dims);
    for (int64_t r = 0; r < rows; ++r) {
      side.scale[r] = c.format == DType::kFloat32 ? 1.0f : 0.01f + 0.001f * pick(0, 9);
      side.zero[r] = !c.zeros ? (c.format == DType::kInt4 ? 8.0f : 0.0f) : 1.0f * pick(-3, 9);
      for (int64_t d = 0; d < dims; ++d) {
        float x = normal(random);
        if (c.format == DType::kFloat32) {
          reinterpret_cast<float*>(side.bytes.data())[r * dims + d] = x;
        } else {
          uint8_t bits = static_cast<uint8_t>(pick(0, 255));
          if (c.format == DType::kFloat8E4M3) bits &= 0xcf;  // up to 1.9: no NaN
          if (c.format == DType::kFloat8E5M2) bits &= 0xbf;
          // A special key spoils its whole row of the output, a special value one column.
          if (c.specials && pick(1, which ? 200 : 8000) == 1) {
            bits |= c.format == DType::kFloat8E4M3 ? 0x7f : pick(0, 1) ? 0x7c : 0x7f;
          }
          if (c.format == DType::kInt4) {
            bits &= 15;
            uint8_t& byte = side.bytes[r * c.row_bytes(which) + d / 2];
            byte = static_cast<uint8_t>(d % 2 ? byte | bits << 4 : bits);
          } else {
            side.bytes[r * dims + d] = bits;
          }
          x = (number(c.format, bits) - side.zero[r]) * side.scale[r];
        }
        values[r * dims + d] = x;
      }
    }
    side.dense.assign(c.batch * c.heads * c.slots() * dims, kNaN);
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t h = 0; h < c.heads; ++h)
        for (int64_t j = 0; j < c.lengths[b * c.heads + h]; ++j) {
          const int64_t slot = c.begin[b] + j;
          const int64_t page = c.table[(b * c.heads + h) * c.max_pages + slot / c.page_size];
          const float* from = &values[c.row(page, h, slot % c.page_size) * dims];
          std::copy(from, from + dims, &side.dense[((b * c.heads + h) * c.slots() + j) * dims]);
        }
  }
  c.q.resize(c.batch * c.num_heads * c.q_len * c.dims[0]);
  for (float& x : c.q) x = normal(random);
  c.out.assign(c.batch * c.num_heads * c.q_len * c.dims[1], kNaN);
  c.lse.assign(c.batch * c.num_heads * c.q_len, kNaN);
  c.dense_out = c.out;
  c.dense_lse = c.lse;
  return c;
}

AttentionParams dense_params(Case& c) {
  AttentionParams p{};
  p.q = c.q.data();
  p.k = c.side[0].dense.data();
  p.v = c.side[1].dense.data();
  p.out = c.dense_out.data();
  p.lse = c.dense_lse.data();
  p.batch = c.batch;
  p.num_heads = c.num_heads;
  p.num_k_heads = p.num_v_heads = c.heads;
  p.q_len = p.q_tokens = c.q_len;
  p.kv_len = p.page_size = c.slots();
  p.head_dim = c.dims[0];
  p.value_head_dim = c.dims[1];
  p.num_pages = c.batch;
  p.max_pages = 1;
  p.q_stride = {c.num_heads * c.q_len * p.head_dim, c.q_len * p.head_dim, p.head_dim};
  p.out_stride = {c.num_heads * c.q_len * p.value_head_dim, c.q_len * p.value_head_dim,
                  p.value_head_dim};
  p.k_stride = {c.heads * p.kv_len * p.head_dim, p.kv_len * p.head_dim, p.head_dim};
  p.v_stride = {c.heads * p.kv_len * p.value_head_dim, p.kv_len * p.value_head_dim,
                p.value_head_dim};
  p.head_map = c.map.data();
  p.kv_lengths = c.lengths.data();
  p.kv_lengths_stride_b = c.heads;
  p.kv_lengths_stride_h = c.shared ? 0 : 1;
  p.scale = 0.1f;
  p.window_left = -1;
  p.window_right = 0;
  return p;
}

AttentionParams cache_params(Case& c) {
  AttentionParams p = dense_params(c);
  const int64_t element = c.format == DType::kFloat32 ? 4 : 1;
  p.k = c.side[0].bytes.data();
  p.v = c.side[1].bytes.data();
  p.out = c.out.data();
  p.lse = c.lse.data();
  for (int which = 0; which < 2; ++which) {
    const int64_t row = c.row_bytes(which) / element;
    (which ? p.v_stride : p.k_stride) = {c.heads * c.page_size * row, c.page_size * row, row};
  }
  p.page_table = c.table.data();
  p.page_table_stride_b = c.heads * c.max_pages;
  p.page_table_stride_h = c.shared ? 0 : c.max_pages;
  p.page_table_stride_p = 1;
  p.num_pages = c.num_pages;
  p.page_size = c.page_size;
  p.max_pages = c.max_pages;
  p.kv_begin = c.begin.data();
  p.k_dtype = p.v_dtype = c.format;
  if (c.format != DType::kFloat32) {
    p.k_scale = c.side[0].scale.data();
    p.v_scale = c.side[1].scale.data();
    p.k_scale_stride = p.v_scale_stride = p.k_zero_stride =
        p.v_zero_stride = {c.heads * c.page_size, c.page_size, 1};
    if (c.zeros) {
      p.k_zero = c.side[0].zero.data();
      p.v_zero = c.side[1].zero.data();
    }
  }
  return p;
}

// Number of elements that differ by more than rounding.
int differences(const std::vector<float>& got, const std::vector<float>& expected,
                float tolerance) {
  int wrong = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const bool both_nan = std::isnan(got[i]) && std::isnan(expected[i]);
    wrong += got[i] != expected[i] && !both_nan && !(std::fabs(got[i] - expected[i]) <= tolerance);
  }
  return wrong;
}

int check_attention(Case& c, int threads) {
  gqa::cpu::attention_forward(dense_params(c), {threads, run_on_threads});
  gqa::cpu::attention_forward(cache_params(c), {threads, run_on_threads});
  // Values up to about 4 in fp32; stored numbers up to 127 are scaled after their sums.
  return differences(c.out, c.dense_out, 1e-4f) + differences(c.lse, c.dense_lse, 1e-4f);
}

// Queries of 16 bits, for which int8 and int4 are multiplied as integers.
int check_rounded(Case& c, int threads) {
  std::vector<uint16_t> q, out(c.out.size());
  for (float& x : c.q) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    q.push_back(static_cast<uint16_t>(bits >> 16));
    bits &= 0xffff0000u;
    std::memcpy(&x, &bits, sizeof x);
  }
  gqa::cpu::attention_forward(dense_params(c), {threads, run_on_threads});
  int wrong = 0;
  for (bool lse_wanted : {false, true}) {
    AttentionParams p = cache_params(c);
    p.q = q.data();
    p.out = out.data();
    p.dtype = DType::kBFloat16;
    gqa::cpu::attention_forward(p, {threads, run_on_threads}, lse_wanted);
    for (size_t i = 0; i < out.size(); ++i) {
      const uint32_t bits = static_cast<uint32_t>(out[i]) << 16;
      float got;
      std::memcpy(&got, &bits, sizeof got);
      const float expected = c.dense_out[i];
      wrong += got != expected && !(std::isnan(got) && std::isnan(expected)) &&
               !(std::fabs(got - expected) <= 0x1p-8f * std::fabs(expected) + 1e-3f);
    }
    wrong += differences(c.lse, c.dense_lse, lse_wanted ? 1e-5f : 1e-3f);
  }
  return wrong;
}

// Calls without work, over pages that would make a bundle: no sequence; maps that name no KV head,
// whose rows are NaN.
int check_no_tasks(Case& c, int threads) {
  AttentionParams p = cache_params(c);
  p.q_len = p.q_tokens = 1;
  p.page_table_stride_h = 0;
  p.batch = 0;
  gqa::cpu::attention_forward(p, {threads, run_on_threads});
  p.batch = c.batch;
  const std::vector<int32_t> nowhere(c.num_heads, -1);
  p.head_map = nowhere.data();
  std::fill(c.lse.begin(), c.lse.end(), 0.0f);
  gqa::cpu::attention_forward(p, {threads, run_on_threads});
  int wrong = 0;
  for (int64_t i = 0; i < c.batch * c.num_heads; ++i) wrong += !std::isnan(c.lse[i]);
  return wrong;
}

// Appends the dense values behind the lengths, with scales of each row, and reads them back: no
// number may be farther away than half a step of its row.
int check_append(Case& c, int threads) {
  AppendParams p{};
  p.cache = cache_params(c);
  p.k = c.side[0].bytes.data();
  p.v = c.side[1].bytes.data();
  p.k_dynamic = p.v_dynamic = c.format != DType::kFloat32;
  if (p.k_dynamic) {
    p.k_scale = c.side[0].scale.data();
    p.v_scale = c.side[1].scale.data();
    if (c.zeros) p.k_zero = c.side[0].zero.data();
    if (c.zeros) p.v_zero = c.side[1].zero.data();
  }
  p.num_tokens = 7;
  std::vector<float> fresh[2];
  for (int which = 0; which < 2; ++which) {
    fresh[which].resize(c.batch * c.heads * p.num_tokens * c.dims[which]);
    for (size_t i = 0; i < fresh[which].size(); ++i)
      fresh[which][i] = std::sin(static_cast<float>(i));
    (which ? p.v_new : p.k_new) = fresh[which].data();
    (which ? p.v_new_stride : p.k_new_stride) = {c.heads * p.num_tokens * c.dims[which],
                                                 p.num_tokens * c.dims[which], c.dims[which]};
  }
  gqa::cpu::cache_append(p, {threads, run_on_threads});

  int wrong = 0;
  for (int which = 0; which < 2; ++which)
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t h = 0; h < c.heads; ++h)
        for (int64_t i = 0; i < p.num_tokens; ++i) {
          const int64_t slot = c.begin[b] + c.lengths[b * c.heads + h] + i;
          if (slot >= c.slots()) continue;
          const int64_t page = c.table[(b * c.heads + h) * c.max_pages + slot / c.page_size];
          if (page >= c.num_pages) continue;
          const Side& side = c.side[which];
          const int64_t row = c.row(page, h, slot % c.page_size), dims = c.dims[which];
          const float zero = c.zeros ? side.zero[row] : c.format == DType::kInt4 ? 8.0f : 0.0f;
          const float* from = &fresh[which][((b * c.heads + h) * p.num_tokens + i) * dims];
          for (int64_t d = 0; d < dims; ++d) {
            float got, step = side.scale[row];
            const uint8_t* bytes = &side.bytes[row * c.row_bytes(which)];
            if (c.format == DType::kFloat32) {
              got = reinterpret_cast<const float*>(bytes)[d];
              step = 0.0f;
            } else if (c.format == DType::kInt4) {
              got = ((d % 2 ? bytes[d / 2] >> 4 : bytes[d / 2] & 15) - zero) * side.scale[row];
            } else {
              got = (number(c.format, bytes[d]) - zero) * side.scale[row];
              if (c.format == DType::kFloat8E4M3) step = side.scale[row] * 32;
              if (c.format == DType::kFloat8E5M2) step = side.scale[row] * 8192;
            }
            wrong += !(std::fabs(got - from[d]) <= step * 0.501f + (c.zeros ? step * 0.5f : 0));
          }
        }
  return wrong;
}

}  // namespace

int main(int argc, char** argv) {
  const unsigned cases = argc > 1 ? std::atoi(argv[1]) : 80;
  int wrong = 0;
  // AVX2 has two ways to read fp8: by what subnormal operands cost.
  const char* kernels[][2] = {{"portable", ""},  {"neon", ""},      {"neon_dot", ""},
                              {"neon_bf16", ""}, {"avx2", "cheap"}, {"avx2", "costly"},
                              {"avx512", ""}};
  for (const auto& [isa, subnormals] : kernels) {
    setenv("GQA_KERNELS_CPU_ISA", isa, 1);
    setenv("GQA_KERNELS_CPU_SUBNORMALS", subnormals, 1);
    try {
      gqa::cpu::chosen_isa();
    } catch (const std::invalid_argument&) {
      std::printf("%s: not on this processor\n", isa);
      continue;
    }
    for (unsigned seed = 0; seed < cases; ++seed) {
      std::mt19937 random(seed);
      Case c = make_case(random);
      const int threads = seed % 3 == 0 ? 1 : 4;
      int attention = check_attention(c, threads);
      if (c.format != DType::kFloat32) attention += check_rounded(c, threads);
      attention += check_no_tasks(c, threads);
      const int append = check_append(c, threads);
      if (attention + append > 0) {
        std::printf("%s %s seed %u, format %d: %d wrong in attention, %d after an append\n", isa,
                    subnormals, seed, static_cast<int>(c.format), attention, append);
      }
      wrong += attention + append;
    }
    std::printf("%s %s: %u cases\n", isa, subnormals, cases);
  }
  std::printf(wrong ? "%d wrong\n" : "ok\n", wrong);
  return wrong ? EXIT_FAILURE : EXIT_SUCCESS;
}
