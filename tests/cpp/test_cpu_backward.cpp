// The CPU backward against the formula written as loops in double precision, for every instruction
// set of this processor, on random shapes and options. Without Torch, so that sanitizers see every
// access: each tensor ends where its memory does.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "core/backward_params.h"
#include "core/dropout.h"
#include "core/visible.h"
#include "cpu/backward/backward.h"

namespace {

using namespace gqa;

void run_on_threads(int64_t n, void (*body)(void*, int64_t), void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < n; ++i) threads.emplace_back(body, context, i);
  if (n > 0) body(context, 0);
  for (std::thread& thread : threads) thread.join();
}

// [B, H, S, D] of small multiples of 1/64, exact in bf16; fp32 or bf16 in memory.
struct Tensor {
  int64_t h, s, d;
  std::vector<float> values;
  std::vector<char> bytes;
  bool half;

  Tensor(bool bf16, int64_t b, int64_t heads, int64_t rows, int64_t dims)
      : h(heads),
        s(rows),
        d(dims),
        values(b * h * s * d),
        bytes(values.size() * (bf16 ? 2 : 4)),
        half(bf16) {}

  Strides strides() const { return {h * s * d, s * d, d}; }
  float& at(int64_t b, int64_t head, int64_t row, int64_t dim) {
    return values[((b * h + head) * s + row) * d + dim];
  }
  void fill(std::mt19937& random) {
    std::normal_distribution<float> normal;
    for (float& x : values) x = std::round(normal(random) * 16) / 16;
    store();
  }
  void store() {
    for (size_t i = 0; i < values.size(); ++i) {
      uint32_t bits;
      std::memcpy(&bits, &values[i], 4);
      const uint16_t top = static_cast<uint16_t>(bits >> 16);
      half ? std::memcpy(&bytes[i * 2], &top, 2) : std::memcpy(&bytes[i * 4], &bits, 4);
    }
  }
  void load() {
    for (size_t i = 0; i < values.size(); ++i) {
      uint32_t bits = 0;
      if (half) {
        uint16_t top;
        std::memcpy(&top, &bytes[i * 2], 2);
        bits = static_cast<uint32_t>(top) << 16;
      } else {
        std::memcpy(&bits, &bytes[i * 4], 4);
      }
      std::memcpy(&values[i], &bits, 4);
    }
  }
};

struct Case {
  BackwardParams p{};
  bool bf16;
  std::vector<int32_t> map, value_map, lengths;
  std::vector<int64_t> seed;
  std::vector<float> slopes, sinks, lse, dlse, mask, dslopes, dsinks;
  std::vector<Tensor> x;  // q, k, v, out, dout, dq, dk, dv
};

Case make_case(std::mt19937& random) {
  const auto pick = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  const auto coin = [&](int one_in) { return pick(1, one_in) == 1; };
  Case c;
  AttentionParams& p = c.p.call;
  c.bf16 = coin(3);
  p.dtype = c.bf16 ? DType::kBFloat16 : DType::kFloat32;
  p.batch = pick(1, 2);
  p.num_heads = pick(1, 7);
  p.num_k_heads = p.num_v_heads = pick(1, 3);
  if (coin(3)) p.num_v_heads = pick(1, 3);
  p.q_len = coin(2) ? pick(1, 5) : pick(1, 150);
  p.kv_len = coin(3) ? pick(0, 20) : pick(1, 200);
  p.head_dim = coin(3) ? pick(1, 256) : pick(1, 64);
  p.value_head_dim = coin(3) ? pick(1, 256) : pick(1, 64);
  p.k_dtype = p.v_dtype = p.dtype;
  p.num_pages = p.batch;
  p.page_size = p.kv_len;
  p.max_pages = 1;
  p.q_tokens = p.q_len;
  p.scale = 1.0f / std::sqrt(static_cast<float>(p.head_dim));
  p.window_left = coin(4) ? pick(0, 60) : -1;
  p.window_right = coin(2) ? 0 : coin(4) ? pick(0, 20) : -1;
  p.softcap = coin(5) ? 2.0f : 0.0f;
  if (coin(4)) {
    p.dropout_threshold = 0x40000000u;
    p.dropout_scale = 4.0f / 3;
    c.seed = {static_cast<int64_t>(random()), static_cast<int64_t>(random())};
    p.dropout_seed = c.seed.data();
  }
  for (int64_t h = 0; h < p.num_heads; ++h) {
    c.map.push_back(static_cast<int32_t>(coin(20) ? 77 : pick(0, p.num_k_heads - 1)));
    c.value_map.push_back(static_cast<int32_t>(pick(0, p.num_v_heads - 1)));
    c.slopes.push_back(static_cast<float>(pick(0, 40)) / 64);
    c.sinks.push_back(static_cast<float>(pick(-40, 40)) / 16);
  }
  if (p.num_v_heads == p.num_k_heads && coin(2)) c.value_map.clear();
  if (!coin(3)) c.slopes.clear();
  if (!coin(3)) c.sinks.clear();
  for (int64_t i = 0; i < p.batch * p.num_k_heads; ++i)
    c.lengths.push_back(static_cast<int32_t>(pick(-1, p.kv_len + 1)));
  if (coin(2)) c.lengths.clear();
  if (coin(5))
    for (int64_t i = 0; i < p.q_len * p.kv_len; ++i)
      c.mask.push_back(coin(6) ? -INFINITY : static_cast<float>(pick(-64, 64)) / 32);
  const int64_t rows = p.batch * p.num_heads * p.q_len;
  c.lse.resize(rows);
  for (int64_t i = 0; i < rows; ++i) c.dlse.push_back(static_cast<float>(pick(-64, 64)) / 32);
  const auto tensor = [&](int64_t heads, int64_t length, int64_t dims) {
    return Tensor(c.bf16, p.batch, heads, length, dims);
  };
  c.x = {tensor(p.num_heads, p.q_len, p.head_dim),
         tensor(p.num_k_heads, p.kv_len, p.head_dim),
         tensor(p.num_v_heads, p.kv_len, p.value_head_dim),
         tensor(p.num_heads, p.q_len, p.value_head_dim),
         tensor(p.num_heads, p.q_len, p.value_head_dim),
         tensor(p.num_heads, p.q_len, p.head_dim),
         tensor(p.num_k_heads, p.kv_len, p.head_dim),
         tensor(p.num_v_heads, p.kv_len, p.value_head_dim)};
  for (int i : {0, 1, 2, 4}) c.x[i].fill(random);
  for (int i : {5, 6, 7}) std::fill(c.x[i].bytes.begin(), c.x[i].bytes.end(), char(0x7f));  // NaN
  c.dslopes.assign(p.batch * p.num_heads, NAN);
  c.dsinks.assign(p.num_heads, NAN);
  return c;
}

// Gives the scores of a case of fp32 an offset that all keys share. P = exp(S - LSE) then shows
// whether the backward sums and rounds the scores as the forward does.
void add_large_offset(Case& c, float offset) {
  const AttentionParams& p = c.p.call;
  const float k0 = std::round(offset / p.scale);
  for (int i : {0, 1})
    for (float& x : c.x[i].values) x *= 1.1f;  // sums that no longer are exact in any order
  for (int64_t i = 0; i < p.batch * p.num_heads * p.q_len; ++i)
    c.x[0].values[i * p.head_dim] = 1.0f;
  for (int64_t i = 0; i < p.batch * p.num_k_heads * p.kv_len; ++i)
    c.x[1].values[i * p.head_dim] = k0;
  for (int i : {0, 1}) c.x[i].store();
  // With these, dS of a row would not sum to 0, and its product with k0 would hide all other errors.
  std::fill(c.dlse.begin(), c.dlse.end(), 0.0f);
  c.sinks.clear();
}

void point_to_tensors(Case& c) {
  AttentionParams& p = c.p.call;
  p.q = c.x[0].bytes.data();
  p.k = c.x[1].bytes.data();
  p.v = c.x[2].bytes.data();
  p.out = c.x[3].bytes.data();
  p.q_stride = c.x[0].strides();
  p.k_stride = c.x[1].strides();
  p.v_stride = c.x[2].strides();
  p.out_stride = c.x[3].strides();
  p.lse = c.lse.data();
  p.head_map = c.map.data();
  p.value_head_map = c.value_map.empty() ? nullptr : c.value_map.data();
  p.alibi_slopes = c.slopes.empty() ? nullptr : c.slopes.data();
  p.alibi_stride_h = 1;
  p.sinks = c.sinks.empty() ? nullptr : c.sinks.data();
  p.kv_lengths = c.lengths.empty() ? nullptr : c.lengths.data();
  p.kv_lengths_stride_b = p.num_k_heads;
  p.kv_lengths_stride_h = 1;
  p.attn_mask = c.mask.empty() ? nullptr : c.mask.data();
  p.mask_dtype = DType::kFloat32;
  p.mask_stride_q = p.kv_len;
  p.mask_stride_k = 1;
  c.p.dout = c.x[4].bytes.data();
  c.p.dq = c.x[5].bytes.data();
  c.p.dk = c.x[6].bytes.data();
  c.p.dv = c.x[7].bytes.data();
  c.p.dout_stride = c.x[4].strides();
  c.p.dq_stride = c.x[5].strides();
  c.p.dk_stride = c.x[6].strides();
  c.p.dv_stride = c.x[7].strides();
  c.p.dlse = c.dlse.data();
  c.p.dslopes = c.slopes.empty() ? nullptr : c.dslopes.data();
  c.p.dsinks = c.sinks.empty() ? nullptr : c.dsinks.data();
}

struct Expected {
  std::vector<double> dq, dk, dv, dslopes, dsinks;
};

// Gradients of one row of scores, added to `e`.
void reference_row(Case& c, int64_t b, int64_t h, int64_t i, Expected& e) {
  const AttentionParams& p = c.p.call;
  const int64_t kh = c.map[h], vh = c.value_map.empty() ? kh : c.value_map[h];
  const int64_t row = (b * p.num_heads + h) * p.q_len + i;
  double* dq = &e.dq[row * p.head_dim];
  if (kh >= p.num_k_heads) {
    std::fill(dq, dq + p.head_dim, NAN);
    return;
  }
  const int64_t n = kv_length(p, b, kh);
  const KeyRange visible = visible_keys(p, n, i);
  const int64_t position = query_position(p, n, i);
  const int64_t keys = std::max<int64_t>(0, visible.end - visible.begin);
  std::vector<double> s(keys), slope_of(keys), dp(keys, 0.0), kept(keys, 1.0);
  double max = -INFINITY, sum = 0, mean = 0;
  for (int64_t m = 0; m < keys; ++m) {
    const int64_t j = visible.begin + m;
    double dot = 0;
    for (int64_t d = 0; d < p.head_dim; ++d)
      dot += double(c.x[0].at(b, h, i, d)) * c.x[1].at(b, kh, j, d);
    dot *= p.scale;
    slope_of[m] = p.scale;
    if (p.softcap != 0) {
      const double t = std::tanh(dot / p.softcap);
      dot = p.softcap * t;
      slope_of[m] *= 1 - t * t;
    }
    if (!c.slopes.empty()) dot -= c.slopes[h] * std::fabs(double(position - j));
    if (!c.mask.empty()) dot += c.mask[i * p.kv_len + j];
    s[m] = dot;
    max = std::max(max, dot);
    if (p.dropout_threshold != 0) {
      float keep;
      dropout_row(p, b, h, i, j, 0, 1, &keep);
      kept[m] = keep;
    }
    for (int64_t d = 0; d < p.value_head_dim; ++d)
      dp[m] += double(c.x[4].at(b, h, i, d)) * c.x[2].at(b, vh, j, d) * kept[m];
  }
  if (max == -INFINITY) return;
  if (!c.sinks.empty()) max = std::max(max, double(c.sinks[h]));
  for (double x : s) sum += std::exp(x - max);
  if (!c.sinks.empty()) sum += std::exp(c.sinks[h] - max);
  for (int64_t m = 0; m < keys; ++m) mean += std::exp(s[m] - max) / sum * dp[m];
  const double delta = mean - c.dlse[row];
  if (!c.sinks.empty()) e.dsinks[h] -= std::exp(c.sinks[h] - max) / sum * delta;
  for (int64_t m = 0; m < keys; ++m) {
    const int64_t j = visible.begin + m;
    const double weight = std::exp(s[m] - max) / sum, ds = weight * (dp[m] - delta);
    e.dslopes[b * p.num_heads + h] -= ds * std::fabs(double(position - j));
    for (int64_t d = 0; d < p.head_dim; ++d) {
      dq[d] += ds * slope_of[m] * c.x[1].at(b, kh, j, d);
      e.dk[((b * p.num_k_heads + kh) * p.kv_len + j) * p.head_dim + d] +=
          ds * slope_of[m] * c.x[0].at(b, h, i, d);
    }
    for (int64_t d = 0; d < p.value_head_dim; ++d)
      e.dv[((b * p.num_v_heads + vh) * p.kv_len + j) * p.value_head_dim + d] +=
          weight * kept[m] * c.x[4].at(b, h, i, d);
  }
}

// Errors count against the largest element: sums of numbers that large were rounded on the way.
int compare(const char* name, const std::vector<float>& got, const std::vector<double>& expected,
            double tolerance, unsigned seed) {
  double largest = 1;
  for (double x : expected)
    if (!std::isnan(x)) largest = std::max(largest, std::fabs(x));
  for (size_t i = 0; i < got.size(); ++i) {
    const bool same = std::isnan(expected[i])
                          ? std::isnan(got[i])
                          : std::fabs(got[i] - expected[i]) <= tolerance * largest;
    if (same) continue;
    std::printf("seed %u: %s[%zu] = %g, expected %g\n", seed, name, i, got[i], expected[i]);
    return 1;
  }
  return 0;
}

int check_case(Case& c, int threads, unsigned seed, double tolerance) {
  point_to_tensors(c);
  const AttentionParams& p = c.p.call;
  const cpu::ThreadPool pool{threads, run_on_threads};
  cpu::attention_forward(p, pool);
  cpu::attention_backward(c.p, pool);
  Expected e;
  for (auto [to, from] : {std::pair{&e.dq, 5}, {&e.dk, 6}, {&e.dv, 7}})
    to->assign(c.x[from].values.size(), 0.0);
  e.dslopes.assign(c.dslopes.size(), 0.0);
  e.dsinks.assign(c.dsinks.size(), 0.0);
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t h = 0; h < p.num_heads; ++h)
      for (int64_t i = 0; i < p.q_len; ++i) reference_row(c, b, h, i, e);
  int wrong = 0;
  for (int i : {5, 6, 7}) c.x[i].load();
  wrong += compare("dq", c.x[5].values, e.dq, tolerance, seed);
  wrong += compare("dk", c.x[6].values, e.dk, tolerance, seed);
  wrong += compare("dv", c.x[7].values, e.dv, tolerance, seed);
  if (c.p.dslopes) wrong += compare("dslopes", c.dslopes, e.dslopes, tolerance, seed);
  if (c.p.dsinks) wrong += compare("dsinks", c.dsinks, e.dsinks, tolerance, seed);
  return wrong;
}

}  // namespace

int main(int argc, char** argv) {
  const unsigned cases = argc > 1 ? std::atoi(argv[1]) : 60;
  int wrong = 0;
  for (const char* isa : {"portable", "neon", "avx2", "avx512"}) {
    setenv("GQA_KERNELS_CPU_ISA", isa, 1);
    unsigned seed = 0;
    try {
      for (; seed < cases; ++seed) {
        std::mt19937 random(seed);
        Case c = make_case(random);
        // fp32 sums of up to 1000 terms; bf16 rounds P, dS, the output and the gradients.
        wrong += check_case(c, seed % 3 == 0 ? 1 : 5, seed, c.bf16 ? 3e-2 : 2e-5);
        if (c.bf16 || c.p.call.softcap != 0) continue;  // a cap makes such scores equal
        // A score near 1000 is known to 1e-4, and so are P and the gradients.
        add_large_offset(c, seed % 2 ? 1000.0f : -1000.0f);
        wrong += check_case(c, seed % 3 == 0 ? 1 : 5, seed, 5e-3);
      }
    } catch (const std::invalid_argument&) {
      std::printf("%s: not on this processor\n", isa);
      continue;
    }
    std::printf("%s: %u cases\n", isa, seed);
  }
  std::printf(wrong ? "%d wrong\n" : "ok\n", wrong);
  return wrong ? EXIT_FAILURE : EXIT_SUCCESS;
}
