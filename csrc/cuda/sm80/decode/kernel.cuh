// Attention of few query tokens: split-KV, with the rows of a group packed (sm_80 and later).
//
// Grid      (tiles x B, splits). Tiles are an upper bound over every head map of the shape, so that
//           the grid never depends on the map's contents; surplus CTAs leave at once.
// CTA       up to 16 rows (query heads of one group x query tokens) of one sequence, and one split
//           of the keys they see: each K and V byte is read once per tile, however the group is
//           shaped. Further tiles of a large group read the same bytes at the same time, from L2.
// Warps     4, each with its own 16 of a block's 64 keys, its own ring of stages in shared memory
//           and its own softmax: no barrier of the CTA between the first block and the last.
// Shared    [stage][warp][K: 16 rows | V: 16 rows | scales and zeros], then Q: 16 rows. K and V are
//           as they are stored: a quantised cache crosses shared memory in its own bytes, too, and
//           is widened in registers. The 16-byte chunks of a row are permuted (load.cuh). After the
//           loop the stages hold the warps' outputs, fp32 [warp][16][kOutStride]. Before it, they
//           are scratch of the search for the tile.
// Result    one split: out and LSE. Several: normalised fp32 outputs and base-2 LSEs; combine.cuh.
// Source    split-KV as in Flash-Decoding (Dao et al. 2023), packed rows as in FlashAttention-3.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../../../core/params.h"
#include "../../../core/visible.h"
#include "../../common/copy_rows.cuh"
#include "../../common/group_rows.cuh"
#include "../../common/mma.cuh"
#include "../../common/ptx.cuh"
#include "../../common/softmax.cuh"
#include "../../common/state.cuh"
#include "../../common/stored_numbers.cuh"
#include "config.h"
#include "load.cuh"
#include "numbers.cuh"
#include "queries.cuh"
#include "scores.cuh"
#include "store.cuh"

namespace gqa::cuda::sm80 {

// What all threads of a CTA know.
struct DecodeTile {
  int b, split;
  GroupTile group;
  Queries queries;
  int length;      // keys of the sequence
  int begin, end;  // of this split
};

// The keys that any row of the tile sees, cut into splits of whole blocks.
__device__ __forceinline__ void cut_keys(const DecodeParams& p, const GroupRow* rows,
                                         DecodeTile& tile) {
  int first = INT32_MAX, last = 0;
  for (int r = 0; r < tile.group.num_rows; ++r) {
    first = min(first, rows[r].token);
    last = max(last, rows[r].token);
  }
  const int64_t shift = tile.length - tile.queries.count;
  const int begin = static_cast<int>(keys_around(p.attention, tile.length, shift + first).begin);
  const int end = static_cast<int>(keys_around(p.attention, tile.length, shift + last).end);
  const int blocks = end <= begin ? 0 : (end - begin + kDecodeBlock - 1) / kDecodeBlock;
  const int chunk = (blocks + p.splits - 1) / p.splits * kDecodeBlock;
  tile.begin = begin + tile.split * chunk;
  tile.end = min(end, tile.begin + chunk);
}

// Rows that have nothing to read: no key in this split (0, LSE -inf), or no KV head (NaN).
__device__ __forceinline__ void write_unread_rows(const DecodeParams& p, const DecodeTile& tile,
                                                  const GroupRow* rows, bool bf16, bool elements) {
  const AttentionParams& a = p.attention;
  const bool bad = tile.group.k_head < 0;
  const float fill = bad ? not_a_number() : 0.f, lse = bad ? not_a_number() : minus_infinity();
  const int lane = threadIdx.x & 31, dim = static_cast<int>(a.value_head_dim);
  for (int r = threadIdx.x / 32; r < tile.group.num_rows; r += kDecodeWarps) {
    const auto [head, token] = rows[r];
    if (p.splits > 1) {
      const int64_t row = (tile.b * a.num_heads + head) * a.q_len + token;
      if (lane == 0) p.partial_lse[tile.split * a.batch * a.num_heads * a.q_len + row] = lse;
      continue;
    }
    uint16_t* out = static_cast<uint16_t*>(a.out) + out_offset(a, tile.queries, head, token);
    for (int d = lane * 4; d < dim; d += 128) {
      store_out(out + d, make_float4(fill, fill, fill, fill), dim - d, bf16, elements);
    }
    if (lane == 0) a.lse[lse_offset(a, tile.queries, head, token)] = lse;
  }
}

// T: what products are of. S: what K and V are stored as. Quantised kernels take the variant
// kElements alone, and do as p.elements says.
template <class T, class S, class C, DecodeVariant kVariant>
__global__ void __launch_bounds__(kDecodeThreads, C::kMinCtas)
    decode_kernel(const __grid_constant__ DecodeParams p) {
  using Numbers = StoredNumbers<S>;
  constexpr int kD = C::kD, kN = Numbers::kPerUnit;
  constexpr bool kPlain = kVariant == DecodeVariant::kPlain;
  extern __shared__ __align__(128) uint8_t smem[];
  __shared__ GroupRow rows[kDecodeRows];
  __shared__ GroupTile group;
  __shared__ float warp_max[kDecodeWarps][kDecodeRows], warp_sum[kDecodeWarps][kDecodeRows];
  __shared__ QueryNumbers query_numbers;
  const AttentionParams& a = p.attention;
  const bool elements = kVariant == DecodeVariant::kElements && (!C::kQuantized || p.elements);
  const bool bf16 = C::kQuantized ? a.dtype == DType::kBFloat16 : std::is_same_v<T, BFloat16>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;

  DecodeTile tile;
  tile.b = blockIdx.x / p.tiles;
  tile.split = blockIdx.y;
  tile.queries = queries_of(a, tile.b);
  if (warp == 0) {
    const GroupTile found =
        find_group_tile<kDecodeRows>(a, static_cast<int>(tile.queries.count), blockIdx.x % p.tiles,
                                     reinterpret_cast<int*>(smem), rows);
    if (lane == 0) group = found;
  }
  __syncthreads();  // the tile is known, its scratch is free
  tile.group = group;
  if (tile.group.num_rows == 0) return;
  tile.length = 0;
  tile.begin = tile.end = 0;
  if (tile.group.k_head >= 0) {
    tile.length = static_cast<int>(kv_length(a, tile.b, tile.group.k_head));
    cut_keys(p, rows, tile);
  }
  if (tile.begin >= tile.end) {
    write_unread_rows(p, tile, rows, bf16, elements);
    return;
  }

  // This warp's keys of block n: key_first + n * 64 + 0..15.
  const int key_first = tile.begin + warp * kWarpKeys;
  const int blocks =
      key_first < tile.end ? (tile.end - key_first + kDecodeBlock - 1) / kDecodeBlock : 0;
  const uint32_t s_loop = smem_u32(smem), s_q = s_loop + C::kQBegin;
  const uint32_t s_warp = s_loop + warp * C::kWarpBytes;
  const BlockLoader<S, C, true> keys{key_rows<S>(a, tile.b, tile.group.k_head),
                                     static_cast<int>(a.head_dim) * C::kBits / 8, tile.end};
  const BlockLoader<S, C, false> values{
      value_rows<S>(a, tile.b, tile.group.k_head, tile.group.v_head),
      static_cast<int>(a.value_head_dim) * C::kBits / 8, tile.end};
  const std::conditional_t<C::kQuantized, NumberLoader, NoNumbers> numbers(
      a, tile.b, tile.group.k_head, tile.group.v_head, tile.end);
  // A group is committed even where there is no block: the waits below count groups.
  auto load_k = [&](int n, uint32_t page) {
    if (n < blocks) {
      const uint32_t stage = s_warp + n % C::kStages * C::kStageBytes;
      keys.load(key_first + n * kDecodeBlock, page, stage, elements);
      numbers.load(key_first + n * kDecodeBlock, page, stage + 2 * C::kTileBytes);
    }
    cp_async_commit();
  };
  auto load_v = [&](int n, uint32_t page) {
    if (n < blocks) {
      const uint32_t stage = s_warp + n % C::kStages * C::kStageBytes;
      values.load(key_first + n * kDecodeBlock, page, stage + C::kTileBytes, elements);
    }
    cp_async_commit();
  };
  // Page of this lane's key of block n: asked for a block ahead, so that copies need not wait.
  auto page_of = [&](int n) -> uint32_t {
    const int key = key_first + n * kDecodeBlock + (lane & 15);
    return key < tile.end ? keys.rows.page(key) : 0;
  };
  uint32_t page = page_of(0);
#pragma unroll
  for (int n = 0; n < C::kStages; ++n) {
    load_k(n, page);
    load_v(n, page);
    page = page_of(n + 1);
  }

  if constexpr (C::kQuantized) {
    load_half_queries<S, C>(a, tile.queries, rows, s_q, query_numbers, elements);
  } else {
    load_queries<C>(a, tile.queries, rows, s_q, elements);
  }
  __syncthreads();  // Q is there
  uint32_t q[C::kQInRegisters ? kD / 16 : 1][4];
  if constexpr (C::kQInRegisters) {
#pragma unroll
    for (int i = 0; i < kD / 16; ++i) {
      ldmatrix_x4(q[i], s_q + chunk_offset<C::kQRowBytes>(lane & 15, 2 * i + (lane >> 4)));
    }
  }

  const int g = lane >> 2, t = lane & 3;  // the lane's rows are g and g + 8
  DecodeRow row[2];
  float q_factor[2], q_sum[2];  // of quantised kernels
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const auto [head, token] = rows[g + 8 * h];
    row[h] = decode_row<kPlain>(a, tile.b, head, token, static_cast<int>(tile.queries.count),
                                tile.length);
    row[h].end = min(row[h].end, tile.end);
    if constexpr (C::kQuantized) {
      q_factor[h] = query_numbers.factor[g + 8 * h];
      q_sum[h] = query_numbers.sum[g + 8 * h];
    }
  }
  const float to_base2 = kPlain ? a.scale * kLog2e : 1.f;
  float o[kD / 8][4] = {}, row_max[2] = {minus_infinity(), minus_infinity()}, row_sum[2] = {};
  float offset[2] = {};  // what the zeros of V make too much in o

  for (int n = 0; n < blocks; ++n) {
    const uint32_t s_k = s_warp + n % C::kStages * C::kStageBytes, s_v = s_k + C::kTileBytes;
    cp_async_wait<2 * C::kStages - 1>();
    __syncwarp();  // the other lanes' copies of K
    float s[2][4] = {};
#pragma unroll
    for (int i = 0; i < kD / (16 * kN); ++i) {
      uint32_t b[4], x[2][2][kN];  // of keys 0-7 and 8-15, of two chunks each
      ldmatrix_x4(b, s_k + chunk_offset<C::kRowBytes>(((lane >> 4) << 3) + (lane & 7),
                                                      2 * i + ((lane >> 3) & 1)));
#pragma unroll
      for (int m = 0; m < 4; ++m) Numbers::pairs(b[m], x[m / 2][m % 2]);
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const int step = i * kN + j, low = 2 * j, high = 2 * j + 1;
        if constexpr (!C::kQInRegisters) {
          ldmatrix_x4(q[0], s_q + chunk_offset<C::kQRowBytes>(lane & 15, 2 * step + (lane >> 4)));
        }
        const auto& a_step = q[C::kQInRegisters ? step : 0];
        mma_16816<T>(s[0], a_step, x[0][low / kN][low % kN], x[0][high / kN][high % kN]);
        mma_16816<T>(s[1], a_step, x[1][low / kN][low % kN], x[1][high / kN][high % kN]);
      }
    }
    LaneNumbers lane_numbers;
    if constexpr (C::kQuantized) lane_numbers.load<S>(a, s_k + 2 * C::kTileBytes);
    __syncwarp();  // K is read: its place may be filled again
    load_k(n + C::kStages, page);
    if constexpr (C::kQuantized) lane_numbers.scale_scores(a, s, q_factor, q_sum);

    const int key = key_first + n * kDecodeBlock + 2 * t;
    modify_scores<kPlain>(a, row, key, s);
    float alpha[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float larger = row_max[h];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float x = s[e >> 1][2 * h + (e & 1)];
        larger = fmaxf(larger, C::kQuantized ? x + lane_numbers.log2_v_scale(e) : x);
      }
      larger = quad_max(larger);
      const float shift = softmax_shift(larger) * to_base2;
      alpha[h] = exp2_approx(fmaf(row_max[h], to_base2, -shift));
      row_max[h] = larger;
      float sum = 0.f;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& x = s[e >> 1][2 * h + (e & 1)];
        x = exp2_approx(fmaf(x, to_base2, -shift));
        sum += x;
      }
      row_sum[h] = row_sum[h] * alpha[h] + sum;
    }
    if constexpr (C::kQuantized) lane_numbers.scale_probabilities(s);
    if (__any_sync(~0u, alpha[0] != 1.f || alpha[1] != 1.f)) {  // rare after the first blocks
#pragma unroll
      for (int j = 0; j < kD / 8; ++j) {
        o[j][0] *= alpha[0], o[j][1] *= alpha[0];
        o[j][2] *= alpha[1], o[j][3] *= alpha[1];
      }
    }
    const uint32_t probabilities[4] = {pack<T>(s[0][0], s[0][1]), pack<T>(s[0][2], s[0][3]),
                                       pack<T>(s[1][0], s[1][1]), pack<T>(s[1][2], s[1][3])};
    if constexpr (C::kQuantized) {
      if (a.v_zero != nullptr) {
        offset[0] *= alpha[0], offset[1] *= alpha[1];
        lane_numbers.add_offsets(offset, probabilities);
      }
    }
    cp_async_wait<2 * C::kStages - 1>();
    __syncwarp();  // the other lanes' copies of V
#pragma unroll
    for (int j = 0; j < kD / (16 * kN); ++j) {
      uint32_t b[4], x[4][kN];  // chunk 2 j of keys 0-7 and 8-15, and the next chunk
      ldmatrix_x4_trans(b, s_v + chunk_offset<C::kRowBytes>(lane & 15, 2 * j + (lane >> 4)));
#pragma unroll
      for (int m = 0; m < 4; ++m) Numbers::pairs(b[m], x[m]);
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        mma_16816<T>(o[2 * j * kN + i], probabilities, x[0][i], x[1][i]);
        mma_16816<T>(o[(2 * j + 1) * kN + i], probabilities, x[2][i], x[3][i]);
      }
    }
    __syncwarp();  // V is read
    load_v(n + C::kStages, page);
    page = page_of(n + C::kStages + 1);
  }
  cp_async_wait<0>();

  // Merge the four warps: each brings its output to the maximum of all.
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    row_sum[h] = quad_sum(row_sum[h]);
    if (t == 0) {
      warp_max[warp][g + 8 * h] = row_max[h] * to_base2;
      warp_sum[warp][g + 8 * h] = row_sum[h];
    }
  }
  __syncthreads();  // every warp is past its stages; its maxima and sums are there
  auto shift_of = [&](int r) {
    float larger = warp_max[0][r];
#pragma unroll
    for (int w = 1; w < kDecodeWarps; ++w) larger = fmaxf(larger, warp_max[w][r]);
    return softmax_shift(larger);
  };
  const uint32_t s_out = s_loop + warp * kDecodeRows * C::kOutStride * 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = g + 8 * h;
    float factor = exp2_approx(row_max[h] * to_base2 - shift_of(r));
    if constexpr (C::kQuantized) {
      offset[h] = quad_sum(offset[h]);
      factor *= Numbers::kPart / kLargestWeight;
    }
    // Number i of unit u of chunk c, dim 8 N c + N u + i, is column u of o[N c + i]: a lane has two
    // neighbouring units.
    auto piece = [&](int c, int i) {
      return (o[c * kN + i % kN][2 * h + i / kN] - offset[h]) * factor;
    };
#pragma unroll
    for (int c = 0; c < kD / (8 * kN); ++c) {
      const uint32_t to = s_out + (r * C::kOutStride + (c * 8 + 2 * t) * kN) * 4;
      if constexpr (kN == 1) {
        st_shared_v2(to, piece(c, 0), piece(c, 1));
      } else {
#pragma unroll
        for (int i = 0; i < 2 * kN; i += 4) {
          st_shared_v4(to + i * 4, piece(c, i), piece(c, i + 1), piece(c, i + 2), piece(c, i + 3));
        }
      }
    }
  }
  __syncthreads();  // the outputs of all warps are there

  constexpr int kLanes = kD / 4;  // threads of a row, one float4 each
  const int dim = static_cast<int>(a.value_head_dim);
#pragma unroll 1
  for (int i = threadIdx.x; i < tile.group.num_rows * kLanes; i += kDecodeThreads) {
    const int r = i / kLanes, d = i % kLanes * 4;
    const auto [head, token] = rows[r];
    float shift = shift_of(r), sum = 0.f;
    float4 x = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) {
      sum += warp_sum[w][r] * exp2_approx(warp_max[w][r] - shift);
      const float4 y = ld_shared_v4(s_loop + ((w * kDecodeRows + r) * C::kOutStride + d) * 4);
      x.x += y.x, x.y += y.y, x.z += y.z, x.w += y.w;
    }
    const bool merged_later = p.splits > 1;
    float factor = 1.f;
    if (a.sinks != nullptr && !merged_later) factor = add_sink(a.sinks[head], shift, sum);
    if (sum != 0.f) factor /= sum;
    x.x *= factor, x.y *= factor, x.z *= factor, x.w *= factor;
    if (merged_later) {
      const int64_t all_rows = a.batch * a.num_heads * a.q_len;
      const int64_t at = tile.split * all_rows + (tile.b * a.num_heads + head) * a.q_len + token;
      if (d < dim) st_global_v4(p.partial_out + at * p.partial_stride + d, x.x, x.y, x.z, x.w);
      if (d == 0) p.partial_lse[at] = sum == 0.f ? minus_infinity() : shift + __log2f(sum);
    } else {
      uint16_t* out = static_cast<uint16_t*>(a.out) + out_offset(a, tile.queries, head, token) + d;
      store_out(out, x, dim - d, bf16, elements);
      if (d == 0) a.lse[lse_offset(a, tile.queries, head, token)] = natural_lse(shift, sum);
    }
  }
}

}  // namespace gqa::cuda::sm80
