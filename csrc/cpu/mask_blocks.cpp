#define GQA_ISA mask_blocks

#include "mask_blocks.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "isa/scalars.h"

namespace gqa::cpu {
namespace {

using mask_blocks::to_float;

// Elements of a mask below which waking another thread costs more than it saves.
constexpr int64_t kMinElementsPerWorker = 512 * 1024;
// Rows that a worker takes at a time.
constexpr int64_t kRowsPerStep = 16;

struct BlockState {
  bool seen, changed;
};

template <class T>
BlockState read_block(const T* mask, int64_t stride, int64_t n) {
  BlockState state{false, false};
  for (int64_t i = 0; i < n; ++i) {
    float value;
    if constexpr (std::is_same_v<T, float>) {
      value = mask[i * stride];
    } else {
      value = to_float(mask[i * stride]);
    }
    state.seen |= !(value < kLowestMaskValue);
    state.changed |= value != 0.0f;
    if (state.seen && state.changed) break;
  }
  return state;
}

// A boolean mask.
BlockState read_block(const uint8_t* mask, int64_t stride, int64_t n) {
  if (stride == 1 && n == 16) {
    uint64_t x[2];
    std::memcpy(x, mask, sizeof x);
    return {(x[0] | x[1]) != 0, (x[0] & x[1]) != 0x0101010101010101u};
  }
  BlockState state{false, false};
  for (int64_t i = 0; i < n; ++i) {
    state.seen |= mask[i * stride] != 0;
    state.changed |= mask[i * stride] == 0;
  }
  return state;
}

}  // namespace

template <class T>
void MaskBlocks::read_row(const T* mask, int64_t stride, int64_t num_keys, int64_t row) {
  uint64_t* seen = seen_.data() + row * row_words_;
  uint64_t* changed = changed_.data() + row * row_words_;
  int64_t begin = -1, end = 0;
  for (int64_t key = 0; key < num_keys; key += kBlockKeys) {
    const int64_t block = key / kBlockKeys;
    const BlockState state =
        read_block(mask + key * stride, stride, std::min(kBlockKeys, num_keys - key));
    if (!state.seen) continue;
    seen[block / 64] |= uint64_t{1} << block % 64;
    if (state.changed) changed[block / 64] |= uint64_t{1} << block % 64;
    if (begin < 0) begin = block;
    end = block + 1;
  }
  rows_[row] = {std::max<int64_t>(begin, 0), end};
}

// Workers take the next rows until none is left.
struct MaskBlocks::Reading {
  MaskBlocks& blocks;
  const AttentionParams& params;
  int64_t heads, tokens;  // rows of one sequence
  int64_t keys;           // of the longest sequence
  std::atomic<int64_t> next{0};

  void run_worker(int64_t) {
    const int64_t rows = static_cast<int64_t>(blocks.rows_.size());
    for (int64_t i = next.fetch_add(kRowsPerStep); i < rows; i = next.fetch_add(kRowsPerStep)) {
      for (int64_t row = i; row < std::min(rows, i + kRowsPerStep); ++row) read(row);
    }
  }

  void read(int64_t row) {
    const int64_t offset = row / (heads * tokens) * params.mask_stride_b +
                           row / tokens % heads * params.mask_stride_h +
                           row % tokens * params.mask_stride_q;
    const int64_t stride = params.mask_stride_k;
    const void* mask = params.attn_mask;
    switch (params.mask_dtype) {
      case DType::kBool:
        return blocks.read_row(static_cast<const uint8_t*>(mask) + offset, stride, keys, row);
      case DType::kBFloat16:
        return blocks.read_row(static_cast<const BFloat16*>(mask) + offset, stride, keys, row);
      case DType::kFloat16:
        return blocks.read_row(static_cast<const Float16*>(mask) + offset, stride, keys, row);
      default: return blocks.read_row(static_cast<const float*>(mask) + offset, stride, keys, row);
    }
  }
};

MaskBlocks::MaskBlocks(const AttentionParams& params, const KeyRanges& ranges,
                       const ThreadPool& pool)
    : ranges_(ranges) {
  if (params.attn_mask == nullptr) return;
  const auto rows_of = [](int64_t stride, int64_t n) { return stride == 0 ? 1 : n; };
  const int64_t batch = rows_of(params.mask_stride_b, params.batch);
  const int64_t heads = rows_of(params.mask_stride_h, params.num_heads);
  const int64_t tokens = rows_of(params.mask_stride_q, params.q_len);
  if (batch * heads * tokens == 0) return;
  stride_q_ = params.mask_stride_q == 0 ? 0 : 1;
  stride_h_ = params.mask_stride_h == 0 ? 0 : tokens;
  stride_b_ = params.mask_stride_b == 0 ? 0 : heads * tokens;
  const int64_t rows = batch * heads * tokens;
  int64_t keys = 0;
  for (int64_t b = 0; b < params.batch; ++b) {
    for (int64_t h = 0; h < params.num_k_heads; ++h) keys = std::max(keys, kv_length(params, b, h));
  }
  row_words_ = (keys + kBlockKeys - 1) / kBlockKeys / 64 + 2;
  rows_.resize(rows);
  seen_.resize(rows * row_words_);
  changed_.resize(rows * row_words_);
  Reading reading{*this, params, heads, tokens, keys};
  const int64_t workers =
      std::min<int64_t>(pool.num_threads, 1 + rows * keys / kMinElementsPerWorker);
  run_workers(pool, workers, reading);
}

}  // namespace gqa::cpu
