// The keys of a tile that a row sees.
#pragma once

#include <cstdint>

#include "../../core/visible.h"
#include "../isa/isa.h"
#include "../mask_blocks.h"
#include "tile.h"

namespace gqa::cpu::GQA_ISA {

// A row of a call: a query token of one head.
struct CallRow {
  int64_t batch, head, token;
  KeyRange visible;  // by everything but the mask
};

// The run of keys [first, first + n) that holds all keys the row sees, counted from `first`.
// `changed` is false without a mask.
inline MaskRun keys_in_tile(const AttentionParams& params, const MaskBlocks& masks,
                            const CallRow& row, int64_t first, int n) {
  const int64_t low = row.visible.begin - first, high = row.visible.end - first;
  MaskRun run{static_cast<int>(low < 0 ? 0 : low), static_cast<int>(high < n ? high : n), false};
  if (low >= n || high <= 0 || run.begin >= run.end) return {0, 0, false};
  if (!masks.has_mask()) return run;
  const int64_t query = query_number(params, row.batch, row.token);
  const MaskRun masked =
      masks.run(row.batch, row.head, query, first + run.begin, run.end - run.begin);
  if (masked.begin >= masked.end) return {0, 0, false};
  return {run.begin + masked.begin, run.begin + masked.end, masked.changed};
}

// The keys that any of the runs [begin, end) holds.
inline StripKeys union_of(const MaskRun* runs, int begin, int end) {
  StripKeys all{0, 0};
  for (int r = begin; r < end; ++r) {
    if (runs[r].begin >= runs[r].end) continue;
    const bool none = all.begin >= all.end;
    all = {none || runs[r].begin < all.begin ? runs[r].begin : all.begin,
           runs[r].end > all.end ? runs[r].end : all.end};
  }
  return all;
}

}  // namespace gqa::cpu::GQA_ISA
