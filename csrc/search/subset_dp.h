// The table of the subset DP: best[mask, g] is the cost of the cheapest partition of the heads in
// `mask` into `g` groups. It is the minimum over all groups that contain the mask's first head
// (gqa_kernels/grouping/search/subset_dp.py).
#pragma once

#include <algorithm>
#include <cstdint>

namespace gqa_search {

// costs [2^n]: the cost of each group, inf if it is not allowed. best [2^n, G + 1]: inf, except
// best[0, 0] = 0.
inline void fill_table(const double* costs, double* best, int n, int64_t lo, int64_t hi,
                       int64_t num_groups) {
  const int64_t width = num_groups + 1;
  for (uint32_t mask = 1; mask < (uint32_t{1} << n); ++mask) {
    const int64_t heads = __builtin_popcount(mask);
    // The numbers of groups that these heads can form, with room for one more group.
    const int64_t fewest = (heads + hi - 1) / hi;
    const int64_t most = std::min(heads / lo, num_groups - 1);
    if (fewest > most) continue;
    const uint32_t first = mask & -mask, others = mask ^ first;
    double* into = best + mask * width;
    for (uint32_t rest = others;; rest = (rest - 1) & others) {
      const uint32_t group = rest | first;
      const int64_t size = __builtin_popcount(group);
      if (lo <= size && size <= hi) {
        const double cost = costs[group];
        const double* without = best + (mask ^ group) * width;
        for (int64_t g = fewest; g <= most; ++g) {
          into[g] = std::min(into[g], without[g - 1] + cost);
        }
      }
      if (rest == 0) break;
    }
  }
}

}  // namespace gqa_search
