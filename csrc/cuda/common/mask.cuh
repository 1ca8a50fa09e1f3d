// Which keys a query token sees, on the device: lengths, causal order and windows. The same rule as
// core/visible.h.
#pragma once

#include "../../core/params.h"

namespace gqa::cuda {

// Keys [begin, end); empty where begin >= end.
struct KeyRange {
  int begin, end;
};

// Keys that the token at `position` sees among `length`; a window side < 0 is unbounded. Both ends
// grow with the position, so the union over a run of tokens is first.begin to last.end.
__device__ __forceinline__ KeyRange visible_keys(int position, int length, int window_left,
                                                 int window_right) {
  KeyRange range{0, length};
  if (window_left >= 0) range.begin = max(0, position - window_left);
  if (window_right >= 0) range.end = min(length, position + window_right + 1);
  return range;
}

}  // namespace gqa::cuda
