// Enumerates all groups of heads within size limits, as columns of the set-partitioning problem,
// and prices them (gqa_kernels/grouping/search/columns.py).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace gqa_search {

// members [hi, n], padded with H, and costs [n]. Smaller groups come first, and groups of one size
// in lexicographic order.
inline void list_columns(const double* distances, int64_t num_heads, int64_t lo, int64_t hi,
                         int64_t n, uint8_t* members, double* costs) {
  std::fill(members, members + hi * n, static_cast<uint8_t>(num_heads));
  std::vector<int64_t> heads(hi);
  std::vector<double> pairs(hi);  // pairs[k]: of the first k + 1 heads
  int64_t column = 0;
  for (int64_t size = lo; size <= hi; ++size) {
    int64_t k = 0;
    heads[0] = 0;
    while (k >= 0) {
      if (heads[k] > num_heads - (size - k)) {  // too few heads follow
        if (--k >= 0) ++heads[k];
        continue;
      }
      double sum = k ? pairs[k - 1] : 0.0;
      for (int64_t i = 0; i < k; ++i) sum += distances[heads[i] * num_heads + heads[k]];
      pairs[k] = sum;
      if (k + 1 < size) {
        heads[k + 1] = heads[k] + 1;
        ++k;
        continue;
      }
      costs[column] = sum / static_cast<double>(size);
      for (int64_t i = 0; i < size; ++i) members[i * n + column] = static_cast<uint8_t>(heads[i]);
      ++column;
      ++heads[k];
    }
  }
}

// reduced [n]: cost minus the prices [H + 1] of the members; prices[H] is 0.
inline void price(const uint8_t* members, const double* costs, const double* prices, int64_t width,
                  int64_t n, double* reduced) {
  constexpr int64_t kBlock = 4096;  // columns at a time, which fit into the cache
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = std::min(n, start + kBlock);
    for (int64_t i = start; i < end; ++i) reduced[i] = costs[i];
    for (int64_t k = 0; k < width; ++k) {
      const uint8_t* row = members + k * n;
      for (int64_t i = start; i < end; ++i) reduced[i] -= prices[row[i]];
    }
  }
}

}  // namespace gqa_search
