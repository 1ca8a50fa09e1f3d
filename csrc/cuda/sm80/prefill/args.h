// The arguments of the prefill kernels.
#pragma once

#include "../../../core/params.h"
#include "../../common/page_divider.h"
#include "../query_tile.cuh"

namespace gqa::cuda::sm80 {

struct PrefillArgs {
  AttentionParams params;
  float softmax_scale;  // from scores, as the kernel leaves them, to base-2 units
  bool elements;        // rows of q, k or v are not whole 16-byte chunks; the general kernel only
  // Pairs of a sequence and a query head are taken in sections of so many.
  int section_pairs;
  PageDivider by_page_size;
};

}  // namespace gqa::cuda::sm80
