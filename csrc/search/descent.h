// Steepest descent over single moves and swaps of a partition, and random swaps that improve.
//
// The numpy code of gqa_kernels/grouping/search is the definition: every sum here runs in the same
// order, so that both take the same steps, bit for bit.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>
#include <vector>

namespace gqa_search {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Partition `num_heads` heads into `num_groups` groups of `lo` to `hi` heads.
struct Problem {
  const double* distances;  // [H, H]
  int64_t num_heads, num_groups, lo, hi;

  double distance(int64_t i, int64_t j) const { return distances[i * num_heads + j]; }
};

// A partition with the sums from which a step's gain is computed cheaply.
class State {
 public:
  State(const Problem& problem, int64_t* labels) : p(problem), labels(labels) {
    sums.assign(p.num_heads * p.num_groups, 0.0);
    sizes.assign(p.num_groups, 0.0);
    pairs.assign(p.num_groups, 0.0);
    for (int64_t h = 0; h < p.num_heads; ++h) {
      for (int64_t i = 0; i < p.num_heads; ++i) sum(i, labels[h]) += p.distance(h, i);
    }
    for (int64_t h = 0; h < p.num_heads; ++h) {
      sizes[labels[h]] += 1;
      pairs[labels[h]] += sum(h, labels[h]);
    }
    for (double& each : pairs) each /= 2;
  }

  void move(int64_t head, int64_t group) {
    const int64_t old = labels[head];
    pairs[old] -= sum(head, old);
    pairs[group] += sum(head, group);
    sizes[old] -= 1;
    sizes[group] += 1;
    for (int64_t i = 0; i < p.num_heads; ++i) {
      sum(i, old) -= p.distance(head, i);
      sum(i, group) += p.distance(head, i);
    }
    labels[head] = group;
  }

  void swap(int64_t first, int64_t second) {
    const int64_t to_first = labels[second], to_second = labels[first];
    move(first, to_first);
    move(second, to_second);
  }

  // Change of the objective when a head moves to another group. Groups may be empty.
  double move_delta(int64_t head, int64_t group) const {
    const int64_t own = labels[head];
    const double left = std::max(sizes[own] - 1, 1.0);
    const double leave = (pairs[own] - sum(head, own)) / left - pairs[own] / sizes[own];
    const double join = (pairs[group] + sum(head, group)) / (sizes[group] + 1);
    return leave + (join - pairs[group] / std::max(sizes[group], 1.0));
  }

  double sum(int64_t head, int64_t group) const { return sums[head * p.num_groups + group]; }
  double& sum(int64_t head, int64_t group) { return sums[head * p.num_groups + group]; }

  const Problem& p;
  int64_t* labels;            // [H]
  std::vector<double> sums;   // [H, G] distance from each head to each group
  std::vector<double> sizes;  // [G]
  std::vector<double> pairs;  // [G] sum of the distances inside each group
};

struct Step {
  double gain = kInfinity;
  int64_t first = 0, second = 0;  // heads, or a head and a group
};

inline Step best_swap(const State& state) {
  const int64_t H = state.p.num_heads;
  // Change in the group of i when j takes its place.
  auto half = [&](int64_t i, int64_t j) {
    const int64_t group = state.labels[i];
    const double change = state.sum(j, group) - state.sum(i, group) - state.p.distance(i, j);
    return change / state.sizes[group];
  };
  Step best;
  for (int64_t i = 0; i < H; ++i) {
    for (int64_t j = i + 1; j < H; ++j) {
      if (state.labels[i] == state.labels[j]) continue;
      const double delta = half(i, j) + half(j, i);
      if (delta < best.gain) best = {delta, i, j};
    }
  }
  return best;
}

inline Step best_move(const State& state) {
  const Problem& p = state.p;
  Step best;
  for (int64_t h = 0; h < p.num_heads; ++h) {
    const int64_t own = state.labels[h];
    if (state.sizes[own] <= p.lo) continue;
    for (int64_t g = 0; g < p.num_groups; ++g) {
      if (g == own || state.sizes[g] >= p.hi) continue;
      const double delta = state.move_delta(h, g);
      if (delta < best.gain) best = {delta, h, g};
    }
  }
  return best;
}

// Makes the best step until none gains more than `min_gain` or the time is up.
inline void descend(const Problem& problem, int64_t* labels, bool moves, double min_gain,
                    std::chrono::steady_clock::time_point deadline) {
  State state(problem, labels);
  while (std::chrono::steady_clock::now() < deadline) {
    const Step swap = best_swap(state);
    const Step move = moves ? best_move(state) : Step();
    if (!(std::min(move.gain, swap.gain) < -min_gain)) break;
    if (move.gain < swap.gain) {
      state.move(move.first, move.second);
    } else {
      state.swap(swap.first, swap.second);
    }
  }
}

// Tries the swaps of heads `first[t * stride]` and `second[t * stride]` in order and keeps those
// that gain.
inline void random_swaps(State& state, const int64_t* first, const int64_t* second, int64_t count,
                         int64_t stride) {
  for (int64_t t = 0; t < count; ++t) {
    const int64_t i = first[t * stride], j = second[t * stride];
    const int64_t a = state.labels[i], b = state.labels[j];
    if (a == b) continue;
    const double gain_a = state.sum(j, a) - state.sum(i, a) - state.p.distance(i, j);
    const double gain_b = state.sum(i, b) - state.sum(j, b) - state.p.distance(i, j);
    if (gain_a / state.sizes[a] + gain_b / state.sizes[b] < 0) state.swap(i, j);
  }
}

// Moves single heads, the cheapest first, until every group has `lo` to `hi` heads. Groups may be
// empty at first.
inline void repair(const Problem& problem, int64_t* labels) {
  for (;;) {
    State state(problem, labels);
    bool too_big = false, too_small = false;
    for (double size : state.sizes) {
      too_big |= size > problem.hi;
      too_small |= size < problem.lo;
    }
    if (!too_big && !too_small) return;
    Step best;
    bool found = false;
    for (int64_t h = 0; h < problem.num_heads; ++h) {
      const double size = state.sizes[labels[h]];
      if (!(too_big ? size > problem.hi : size > problem.lo)) continue;
      for (int64_t g = 0; g < problem.num_groups; ++g) {
        if (!(too_small ? state.sizes[g] < problem.lo : state.sizes[g] < problem.hi)) continue;
        const double delta = state.move_delta(h, g);
        if (!found || delta < best.gain) best = {delta, h, g};
        found = true;
      }
    }
    state.move(best.first, best.second);
  }
}

}  // namespace gqa_search
