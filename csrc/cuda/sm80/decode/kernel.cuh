// Attention of few query tokens: split-KV, with the rows of a group packed (sm_80 and later).
//
// Grid      (tiles x B, splits). Tiles are an upper bound over every head map of the shape, so that
//           the grid never depends on the map's contents; surplus CTAs leave at once.
// CTA       up to 16 rows (query heads of one group x query tokens) of one sequence, and one split
// of
//           the keys they see: each K and V byte is read once per tile, however the group is
//           shaped. Further tiles of a large group read the same bytes at the same time, from L2.
// Warps     4, each with its own 16 of a block's 64 keys, its own ring of stages in shared memory
// and
//           its own softmax: no barrier of the CTA between the first block and the last.
// Shared    [stage][warp][K: 16 rows | V: 16 rows], then Q: 16 rows. Rows are kD elements whose
//           16-byte chunks are permuted (load.cuh). After the loop the stages hold the warps'
//           outputs, fp32 [warp][16][kD + 8]. Before it, they are scratch of the search for the
//           tile.
// Result    one split: out and LSE. Several: normalised fp32 outputs and base-2 LSEs; combine.cuh.
// Source    split-KV as in Flash-Decoding (Dao et al. 2023), packed rows as in FlashAttention-3.
#pragma once

#include <cstdint>

#include "../../../core/params.h"
#include "../../../core/visible.h"
#include "../../common/copy_rows.cuh"
#include "../../common/group_rows.cuh"
#include "../../common/mma.cuh"
#include "../../common/ptx.cuh"
#include "../../common/softmax.cuh"
#include "../../common/state.cuh"
#include "config.h"
#include "load.cuh"
#include "scores.cuh"

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

// Stores four output elements, rounded, of which `count` exist.
template <class T, bool kElements>
__device__ __forceinline__ void store_out(T* to, float4 x, int count) {
  const uint32_t low = pack<T>(x.x, x.y), high = pack<T>(x.z, x.w);
  if constexpr (kElements) {
    const uint32_t pairs[2] = {low, high};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) to[i].bits = static_cast<uint16_t>(pairs[i / 2] >> (i % 2 * 16));
    }
  } else if (count > 0) {
    st_global_v2(to, low, high);
  }
}

// Rows that have nothing to read: no key in this split (0, LSE -inf), or no KV head (NaN).
template <class T, bool kElements>
__device__ __forceinline__ void write_unread_rows(const DecodeParams& p, const DecodeTile& tile,
                                                  const GroupRow* rows) {
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
    T* out = static_cast<T*>(a.out) + out_offset(a, tile.queries, head, token);
    for (int d = lane * 4; d < dim; d += 128) {
      store_out<T, kElements>(out + d, make_float4(fill, fill, fill, fill), dim - d);
    }
    if (lane == 0) a.lse[lse_offset(a, tile.queries, head, token)] = lse;
  }
}

template <class T, int kD, DecodeVariant kVariant>
__global__ void __launch_bounds__(kDecodeThreads, DecodeConfig<kD>::kMinCtas)
    decode_kernel(const __grid_constant__ DecodeParams p) {
  using C = DecodeConfig<kD>;
  constexpr bool kPlain = kVariant == DecodeVariant::kPlain;
  constexpr bool kElements = kVariant == DecodeVariant::kElements;
  extern __shared__ __align__(128) uint8_t smem[];
  __shared__ GroupRow rows[kDecodeRows];
  __shared__ GroupTile group;
  __shared__ float warp_max[kDecodeWarps][kDecodeRows], warp_sum[kDecodeWarps][kDecodeRows];
  const AttentionParams& a = p.attention;
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
    write_unread_rows<T, kElements>(p, tile, rows);
    return;
  }

  // This warp's keys of block n: key_first + n * 64 + 0..15.
  const int key_first = tile.begin + warp * kWarpKeys;
  const int blocks =
      key_first < tile.end ? (tile.end - key_first + kDecodeBlock - 1) / kDecodeBlock : 0;
  const uint32_t s_loop = smem_u32(smem), s_q = s_loop + C::kQBegin;
  const uint32_t s_warp = s_loop + warp * 2 * C::kTileBytes;
  const BlockLoader<T, kD, true, kElements> keys{key_rows<T>(a, tile.b, tile.group.k_head),
                                                 static_cast<int>(a.head_dim), tile.end};
  const BlockLoader<T, kD, false, kElements> values{
      value_rows<T>(a, tile.b, tile.group.k_head, tile.group.v_head),
      static_cast<int>(a.value_head_dim), tile.end};
  // A group is committed even where there is no block: the waits below count groups.
  auto load_k = [&](int n, uint32_t page) {
    if (n < blocks) {
      keys.load(key_first + n * kDecodeBlock, page, s_warp + n % C::kStages * C::kStageBytes);
    }
    cp_async_commit();
  };
  auto load_v = [&](int n, uint32_t page) {
    if (n < blocks) {
      values.load(key_first + n * kDecodeBlock, page,
                  s_warp + n % C::kStages * C::kStageBytes + C::kTileBytes);
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

  // Q: four rows per warp, through registers (a cp.async group would wait for K and V before it).
  {
    const int row = warp * 4 + (lane >> 3), dim = static_cast<int>(a.head_dim);
    const auto [head, token] = rows[row];
    const T* src =
        static_cast<const T*>(a.q) + (head < 0 ? 0 : q_offset(a, tile.queries, head, token));
    const int available = head < 0 ? 0 : dim;
#pragma unroll
    for (int c = 0; c < kD / 64; ++c) {
      const int chunk = c * 8 + (lane & 7);
      uint4 x = make_uint4(0, 0, 0, 0);
      if (kElements || available % 8 != 0) {
        x = load_elements(src + chunk * 8, available - chunk * 8);
      } else if (chunk * 8 < available) {
        x = ld_global_v4(src + chunk * 8);
      }
      st_shared_v4(s_q + chunk_offset<kD>(row, chunk), x);
    }
  }
  __syncthreads();  // Q is there
  uint32_t q[C::kQInRegisters ? kD / 16 : 1][4];
  if constexpr (C::kQInRegisters) {
#pragma unroll
    for (int i = 0; i < kD / 16; ++i) {
      ldmatrix_x4(q[i], s_q + chunk_offset<kD>(lane & 15, 2 * i + (lane >> 4)));
    }
  }

  const int g = lane >> 2, t = lane & 3;  // the lane's rows are g and g + 8
  DecodeRow row[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const auto [head, token] = rows[g + 8 * h];
    row[h] = decode_row<kPlain>(a, tile.b, head, token, static_cast<int>(tile.queries.count),
                                tile.length);
    row[h].end = min(row[h].end, tile.end);
  }
  const float to_base2 = kPlain ? a.scale * kLog2e : 1.f;
  float o[kD / 8][4] = {}, row_max[2] = {minus_infinity(), minus_infinity()}, row_sum[2] = {};

  for (int n = 0; n < blocks; ++n) {
    const uint32_t s_k = s_warp + n % C::kStages * C::kStageBytes, s_v = s_k + C::kTileBytes;
    cp_async_wait<2 * C::kStages - 1>();
    __syncwarp();  // the other lanes' copies of K
    float s[2][4] = {};
#pragma unroll
    for (int i = 0; i < kD / 16; ++i) {
      uint32_t b[4];
      ldmatrix_x4(
          b, s_k + chunk_offset<kD>(((lane >> 4) << 3) + (lane & 7), 2 * i + ((lane >> 3) & 1)));
      if constexpr (!C::kQInRegisters) {
        ldmatrix_x4(q[0], s_q + chunk_offset<kD>(lane & 15, 2 * i + (lane >> 4)));
      }
      mma_16816<T>(s[0], q[C::kQInRegisters ? i : 0], b[0], b[1]);
      mma_16816<T>(s[1], q[C::kQInRegisters ? i : 0], b[2], b[3]);
    }
    __syncwarp();  // K is read: its place may be filled again
    load_k(n + C::kStages, page);

    const int key = key_first + n * kDecodeBlock + 2 * t;
    float alpha[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float larger = row_max[h];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& x = s[e >> 1][2 * h + (e & 1)];
        x = modified_score<kPlain>(a, row[h], key + (e >> 1) * 8 + (e & 1), x);
        larger = fmaxf(larger, x);
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
    if (__any_sync(~0u, alpha[0] != 1.f || alpha[1] != 1.f)) {  // rare after the first blocks
#pragma unroll
      for (int j = 0; j < kD / 8; ++j) {
        o[j][0] *= alpha[0], o[j][1] *= alpha[0];
        o[j][2] *= alpha[1], o[j][3] *= alpha[1];
      }
    }
    const uint32_t probabilities[4] = {pack<T>(s[0][0], s[0][1]), pack<T>(s[0][2], s[0][3]),
                                       pack<T>(s[1][0], s[1][1]), pack<T>(s[1][2], s[1][3])};
    cp_async_wait<2 * C::kStages - 1>();
    __syncwarp();  // the other lanes' copies of V
#pragma unroll
    for (int j = 0; j < kD / 16; ++j) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, s_v + chunk_offset<kD>(lane & 15, 2 * j + (lane >> 4)));
      mma_16816<T>(o[2 * j], probabilities, b[0], b[1]);
      mma_16816<T>(o[2 * j + 1], probabilities, b[2], b[3]);
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
    const float factor = exp2_approx(row_max[h] * to_base2 - shift_of(r));
#pragma unroll
    for (int j = 0; j < kD / 8; ++j) {
      st_shared_v2(s_out + (r * C::kOutStride + j * 8 + 2 * t) * 4, o[j][2 * h] * factor,
                   o[j][2 * h + 1] * factor);
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
      T* out = static_cast<T*>(a.out) + out_offset(a, tile.queries, head, token) + d;
      store_out<T, kElements>(out, x, dim - d);
      if (d == 0) a.lse[lse_offset(a, tile.queries, head, token)] = natural_lse(shift, sum);
    }
  }
}

}  // namespace gqa::cuda::sm80
