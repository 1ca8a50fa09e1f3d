#include "backward.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "../aligned.h"
#include "kernel_table.h"

namespace gqa::cpu {
namespace {

// Best first.
const BackwardKernels* const kAllKernels[] = {
#if defined(GQA_HAVE_AVX512)
    &kAvx512Backward,
#endif
#if defined(__x86_64__)
    &kAvx2Backward,
#elif defined(__aarch64__)
    &kNeonBackward,
#endif
    &kPortableBackward,
};

template <class T>
void fill_rows(void* data, const Strides& strides, int64_t b, int64_t h, int64_t rows, int64_t dims,
               T value) {
  T* first = static_cast<T*>(data) + b * strides.b + h * strides.h;
  for (int64_t i = 0; i < rows; ++i) std::fill_n(first + i * strides.s, dims, value);
}

// Fills one head of a gradient with 0 or NaN.
void fill_head(DType dtype, void* data, const Strides& strides, int64_t b, int64_t h, int64_t rows,
               int64_t dims, bool nan) {
  switch (dtype) {
    case DType::kBFloat16:
      return fill_rows(data, strides, b, h, rows, dims, BFloat16{uint16_t(nan ? 0x7fc0 : 0)});
    case DType::kFloat16:
      return fill_rows(data, strides, b, h, rows, dims, Float16{uint16_t(nan ? 0x7e00 : 0)});
    default:
      return fill_rows(data, strides, b, h, rows, dims,
                       nan ? std::numeric_limits<float>::quiet_NaN() : 0.0f);
  }
}

// Fills what no task writes: dQ of heads whose map entry is out of range (NaN, so that nobody
// overlooks it), dK and dV of KV heads that no query reads (0).
void fill_rest(const BackwardParams& params, const BackwardSchedule& schedule) {
  const AttentionParams& call = params.call;
  std::vector<char> k_written(call.batch * call.num_k_heads);
  std::vector<char> v_written(call.batch * call.num_v_heads);
  for (const BackwardTask& task : schedule.tasks) {
    if (task.k_head >= 0) k_written[task.batch * call.num_k_heads + task.k_head] = 1;
    if (task.v_head >= 0) v_written[task.batch * call.num_v_heads + task.v_head] = 1;
  }
  for (int64_t b = 0; b < call.batch; ++b) {
    for (const int32_t h : schedule.invalid_heads) {
      fill_head(call.dtype, params.dq, params.dq_stride, b, h, call.q_len, call.head_dim, true);
    }
    for (int64_t h = 0; h < call.num_k_heads; ++h) {
      if (k_written[b * call.num_k_heads + h]) continue;
      fill_head(call.dtype, params.dk, params.dk_stride, b, h, call.kv_len, call.head_dim, false);
    }
    for (int64_t h = 0; h < call.num_v_heads; ++h) {
      if (v_written[b * call.num_v_heads + h]) continue;
      fill_head(call.dtype, params.dv, params.dv_stride, b, h, call.kv_len, call.value_head_dim,
                false);
    }
  }
}

// to[i] = sum of row i of rows [n, length], in a fixed order and in double.
void sum_rows(const std::vector<float>& rows, int64_t n, int64_t length, float* to) {
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0;
    for (int64_t t = 0; t < length; ++t) sum += rows[i * length + t];
    to[i] = static_cast<float>(sum);
  }
}

void sum_slopes_and_sinks(const BackwardParams& params, const std::vector<float>& slope_rows,
                          const std::vector<float>& sink_rows) {
  const AttentionParams& call = params.call;
  const int64_t heads = call.num_heads;
  if (params.dslopes) sum_rows(slope_rows, call.batch * heads, call.q_len, params.dslopes);
  if (!params.dsinks) return;
  std::vector<float> by_sequence(call.batch * heads);
  sum_rows(sink_rows, call.batch * heads, call.q_len, by_sequence.data());
  for (int64_t h = 0; h < heads; ++h) {
    double sum = 0;
    for (int64_t b = 0; b < call.batch; ++b) sum += by_sequence[b * heads + h];
    params.dsinks[h] = static_cast<float>(sum);
  }
}

// Workers take the next task until none is left.
struct Work {
  const BackwardState& state;
  const BackwardKernels& kernels;
  std::vector<PartSums>& heads;  // KV heads in parts, by BackwardTask::merge
  std::atomic<size_t> next{0};

  void run_worker(int64_t) {
    const AttentionParams& call = state.params.call;
    const std::vector<BackwardTask>& tasks = state.schedule.tasks;
    const SumWidths widths = kernels.sum_widths(call);
    const int type = static_cast<int>(call.dtype);
    AlignedFloats scratch(kernels.scratch_floats(call, state.schedule.tile)), sums;
    for (size_t i = next.fetch_add(1); i < tasks.size(); i = next.fetch_add(1)) {
      const BackwardTask& task = tasks[i];
      sums.reserve(sum_floats(task, widths));
      kernels.run_task[type](state, task, scratch.get(), sums.get());
      if (task.merge < 0) {
        kernels.store_sums[type](state.params, task, sums.get());
      } else if (heads[task.merge].add(task, sums)) {
        AlignedFloats total = std::move(heads[task.merge].total());
        kernels.store_sums[type](state.params, tasks[i - task.part], total.get());
      }
    }
  }
};

}  // namespace

void attention_backward(const BackwardParams& params, const ThreadPool& pool, bool batch_invariant,
                        const KeyRanges& ranges, int64_t first_sequence) {
  const DefaultFloatMode mode;  // for the sums that this thread adds at the end
  const BackwardKernels& kernels =
      select_kernels(kAllKernels, chosen_isa(), [](const BackwardKernels&) { return true; });
  const AttentionParams& call = params.call;
  const MaskBlocks masks(call, ranges, pool);
  const BackwardSchedule schedule =
      make_backward_schedule(call, masks, batch_invariant, pool.num_threads);
  fill_rest(params, schedule);

  const int64_t row_count = call.batch * call.num_heads * call.q_len;
  std::vector<float> slope_rows(params.dslopes ? row_count : 0);
  std::vector<float> sink_rows(params.dsinks ? row_count : 0);
  std::vector<PartSums> heads(schedule.num_merges);
  for (const BackwardTask& task : schedule.tasks) {
    if (task.merge >= 0 && task.part == 0) heads[task.merge].start(&task, kernels.sum_widths(call));
  }
  const BackwardState state{params,
                            masks,
                            schedule,
                            params.dslopes ? slope_rows.data() : nullptr,
                            params.dsinks ? sink_rows.data() : nullptr,
                            first_sequence};
  Work work{state, kernels, heads};
  run_workers(pool, schedule.num_workers, work);
  sum_slopes_and_sinks(params, slope_rows, sink_rows);
}

}  // namespace gqa::cpu
