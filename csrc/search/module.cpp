// The compiled core of the grouping search: numpy arrays in, numpy arrays out.
// gqa_kernels/native/search_core.py compiles it at first use. Its callers check arguments.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "columns.h"
#include "descent.h"
#include "subset_dp.h"

namespace py = pybind11;

namespace {

using Doubles = py::array_t<double, py::array::c_style | py::array::forcecast>;
using Labels = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;
using Bytes = py::array_t<uint8_t, py::array::c_style | py::array::forcecast>;

gqa_search::Problem problem_of(const Doubles& distances, int64_t num_groups, int64_t lo,
                               int64_t hi) {
  return {distances.data(), distances.shape(0), num_groups, lo, hi};
}

Labels copy(const Labels& labels) {
  Labels result({labels.shape(0), labels.shape(1)});
  std::copy_n(labels.data(), labels.size(), result.mutable_data());
  return result;
}

Labels descend(const Doubles& distances, int64_t num_groups, int64_t lo, int64_t hi,
               const Labels& labels, bool moves, double min_gain, double seconds) {
  const auto problem = problem_of(distances, num_groups, lo, hi);
  Labels result = copy(labels);
  int64_t* data = result.mutable_data();
  const int64_t count = labels.shape(0);
  py::gil_scoped_release release;
  using Clock = std::chrono::steady_clock;
  // Limit the time to a year, which the clock can represent.
  const std::chrono::duration<double> left(std::clamp(seconds, 0.0, 3e7));
  const auto deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(left);
  for (int64_t b = 0; b < count; ++b) {
    gqa_search::descend(problem, data + b * problem.num_heads, moves, min_gain, deadline);
  }
  return result;
}

Labels random_swaps(const Doubles& distances, int64_t num_groups, const Labels& labels,
                    const Labels& swaps) {
  const auto problem = problem_of(distances, num_groups, 1, distances.shape(0));
  Labels result = copy(labels);
  int64_t* data = result.mutable_data();
  const int64_t steps = swaps.shape(0), count = labels.shape(0);  // swaps [T, 2, B]
  const int64_t* heads = swaps.data();
  py::gil_scoped_release release;
  for (int64_t b = 0; b < count; ++b) {
    gqa_search::State state(problem, data + b * problem.num_heads);
    gqa_search::random_swaps(state, heads + b, heads + count + b, steps, 2 * count);
  }
  return result;
}

Labels repair(const Doubles& distances, int64_t num_groups, int64_t lo, int64_t hi,
              const Labels& labels) {
  const auto problem = problem_of(distances, num_groups, lo, hi);
  Labels result = copy(labels);
  int64_t* data = result.mutable_data();
  const int64_t count = labels.shape(0);
  py::gil_scoped_release release;
  for (int64_t b = 0; b < count; ++b) gqa_search::repair(problem, data + b * problem.num_heads);
  return result;
}

Doubles subset_table(const Doubles& costs, int64_t lo, int64_t hi, int64_t num_groups) {
  const int64_t size = costs.shape(0);
  Doubles best({size, num_groups + 1});
  double* data = best.mutable_data();
  const double* given = costs.data();
  py::gil_scoped_release release;
  std::fill_n(data, size * (num_groups + 1), gqa_search::kInfinity);
  data[0] = 0.0;
  gqa_search::fill_table(given, data, __builtin_ctzll(size), lo, hi, num_groups);
  return best;
}

py::tuple list_columns(const Doubles& distances, int64_t lo, int64_t hi, int64_t count) {
  Bytes members({hi, count});
  Doubles costs(count);
  uint8_t* heads = members.mutable_data();
  double* values = costs.mutable_data();
  const double* given = distances.data();
  const int64_t num_heads = distances.shape(0);
  {
    py::gil_scoped_release release;
    gqa_search::list_columns(given, num_heads, lo, hi, count, heads, values);
  }
  return py::make_tuple(members, costs);
}

Doubles reduced_costs(const Bytes& members, const Doubles& costs, const Doubles& prices) {
  Doubles reduced(costs.shape(0));
  double* into = reduced.mutable_data();
  const uint8_t* heads = members.data();
  const double *given = costs.data(), *paid = prices.data();
  const int64_t width = members.shape(0), count = costs.shape(0);
  py::gil_scoped_release release;
  gqa_search::price(heads, given, paid, width, count, into);
  return reduced;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("descend", &descend);
  module.def("random_swaps", &random_swaps);
  module.def("repair", &repair);
  module.def("subset_table", &subset_table);
  module.def("list_columns", &list_columns);
  module.def("reduced_costs", &reduced_costs);
}
