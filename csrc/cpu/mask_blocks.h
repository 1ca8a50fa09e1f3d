// Which keys a row sees, by the call's mask and key ranges too. For each row of a mask and each block
// of 16 keys: whether the mask hides all of them, and whether it changes any score. Kernels skip keys
// that no row of a tile sees, and read the mask only in blocks that it changes.
#pragma once

#include <cstdint>
#include <vector>

#include "../core/params.h"
#include "../core/visible.h"
#include "key_ranges.h"
#include "thread_pool.h"

namespace gqa::cpu {

// The run of a tile's keys, counted from its first, that holds all keys a row sees; empty if begin
// >= end. changed: whether the mask hides some keys of the run, or adds to their scores.
struct MaskRun {
  int begin, end;
  bool changed;
};

class MaskBlocks {
 public:
  // Reads the whole mask once, on the pool's threads.
  MaskBlocks(const AttentionParams& params, const KeyRanges& ranges, const ThreadPool& pool);

  bool has_mask() const { return !rows_.empty(); }
  // Whether a mask or ranges hide keys that lengths, causality and windows don't.
  bool hides_keys() const { return has_mask() || ranges_.data != nullptr; }
  // Whether all heads have the same mask and ranges.
  bool same_for_heads() const { return stride_h_ == 0 && ranges_.stride_h == 0; }

  // Of `all` keys, those from the first block to the last in which a row sees any. query: its number.
  KeyRange keys(int64_t b, int64_t h, int64_t query, KeyRange all) const {
    if (has_mask()) {
      const Row& row = rows_[index(b, h, query)];
      all.begin = std::max(all.begin, row.begin * kBlockKeys);
      all.end = std::min(all.end, row.end * kBlockKeys);
    }
    return ranges_.within(all, b, h, query);
  }

  // The keys of a query token by everything but the mask.
  KeyRange visible(const AttentionParams& params, int64_t length, int64_t b, int64_t h,
                   int64_t token) const {
    const KeyRange keys = visible_keys(params, length, token);
    return ranges_.data ? ranges_.within(keys, b, h, query_number(params, b, token)) : keys;
  }

  // Of keys first to first + n - 1, at most 128, of a row.
  MaskRun run(int64_t b, int64_t h, int64_t query, int64_t first, int n) const {
    const int64_t row = index(b, h, query), block = first / kBlockKeys;
    const int blocks = static_cast<int>((first + n - 1) / kBlockKeys - block) + 1;
    const uint64_t seen = bits(seen_.data() + row * row_words_, block, blocks);
    if (seen == 0) return {0, 0, false};
    const int low = __builtin_ctzll(seen), high = 64 - __builtin_clzll(seen);
    const uint64_t within = (~uint64_t{0} >> (64 - high)) & ~uint64_t{0} << low;
    const uint64_t changed = bits(changed_.data() + row * row_words_, block, blocks) | ~seen;
    const int begin = static_cast<int>((block + low) * kBlockKeys - first);
    const int end = static_cast<int>((block + high) * kBlockKeys - first);
    return {begin < 0 ? 0 : begin, end < n ? end : n, (changed & within) != 0};
  }

 private:
  static constexpr int64_t kBlockKeys = 16;

  struct Row {
    int64_t begin, end;  // blocks
  };

  int64_t index(int64_t b, int64_t h, int64_t query) const {
    return b * stride_b_ + h * stride_h_ + query * stride_q_;
  }
  static uint64_t bits(const uint64_t* words, int64_t first, int n) {
    const int64_t word = first / 64, shift = first % 64;
    uint64_t found = words[word] >> shift;
    if (shift != 0) found |= words[word + 1] << (64 - shift);
    return found & ~uint64_t{0} >> (64 - n);
  }

  // Reads one row. T: as the mask is stored.
  template <class T>
  void read_row(const T* mask, int64_t stride, int64_t num_keys, int64_t row);

  struct Reading;

  const KeyRanges ranges_;
  int64_t stride_b_ = 0, stride_h_ = 0, stride_q_ = 0;  // rows; 0 if the mask is the same for all
  int64_t row_words_ = 0;                               // one more than its blocks need
  std::vector<Row> rows_;
  std::vector<uint64_t> seen_, changed_;  // [rows, row_words]: a bit for each block
};

}  // namespace gqa::cpu
