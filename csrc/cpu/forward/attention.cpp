#include "attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "../aligned.h"
#include "kernel_table.h"
#include "schedule.h"

namespace gqa::cpu {
namespace {

// Best first.
const ForwardKernels* const kAllKernels[] = {
#if defined(GQA_HAVE_AMX)
    &kAmxForward,
#endif
#if defined(GQA_HAVE_AVX512_BF16)
    &kAvx512Bf16Forward,
#endif
#if defined(GQA_HAVE_AVX512)
    &kAvx512Forward,
#endif
#if defined(__x86_64__)
    &kAvx2Forward,
#elif defined(__aarch64__)
    &kNeonBf16Forward, &kNeonFhmForward, &kNeonDotForward, &kNeonForward,
#endif
    &kPortableForward,
};

const ForwardKernels& select(DType dtype) {
  return select_kernels(kAllKernels, chosen_isa(), [dtype](const ForwardKernels& kernels) {
    return kernels.run_bundle[static_cast<int>(dtype)] != nullptr;
  });
}

// Rows [first_token, end) of out and lse of a head, of all sequences.
template <class T>
void fill_rows(const AttentionParams& params, int32_t head, int64_t first_token, T out_value,
               float lse_value) {
  const int64_t batch = params.q_offsets == nullptr ? params.batch : 1;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t t = first_token; t < params.q_tokens; ++t) {
      T* out = static_cast<T*>(params.out) + b * params.out_stride.b + head * params.out_stride.h +
               t * params.out_stride.s;
      std::fill(out, out + params.value_head_dim, out_value);
    }
    float* lse = params.lse + (b * params.num_heads + head) * params.q_tokens;
    std::fill(lse + first_token, lse + params.q_tokens, lse_value);
  }
}

// Fills a head whose map entry is out of range with NaN, so that nobody overlooks it.
void fill_head_with_nan(const AttentionParams& params, int32_t head) {
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  switch (params.dtype) {
    case DType::kBFloat16: return fill_rows(params, head, 0, BFloat16{0x7fc0}, kNaN);
    case DType::kFloat16: return fill_rows(params, head, 0, Float16{0x7e00}, kNaN);
    default: return fill_rows(params, head, 0, kNaN, kNaN);
  }
}

// Packed tokens after the last sequence see no key.
void fill_tokens_of_no_sequence(const AttentionParams& params) {
  const int64_t first = params.q_offsets[params.batch];
  for (int32_t head = 0; head < params.num_heads; ++head) {
    switch (params.dtype) {
      case DType::kBFloat16: fill_rows(params, head, first, BFloat16{0}, -INFINITY); break;
      case DType::kFloat16: fill_rows(params, head, first, Float16{0}, -INFINITY); break;
      default: fill_rows(params, head, first, 0.0f, -INFINITY);
    }
  }
}

// Workers take the next task until none is left: tasks differ in length, and so do threads in
// speed.
struct Work {
  const CallState& call;
  BundleFunction run_bundle;
  float* scratch;
  int64_t scratch_stride;  // floats per worker
  std::atomic<size_t> next{0};

  void run_worker(int64_t worker) {
    const std::vector<Bundle>& bundles = call.schedule.bundles;
    for (size_t i = next.fetch_add(1); i < bundles.size(); i = next.fetch_add(1)) {
      run_bundle(call, bundles[i], scratch + worker * scratch_stride);
    }
  }
};

}  // namespace

void attention_forward(const AttentionParams& params, const ThreadPool& pool, bool lse_wanted,
                       bool batch_invariant, const KeyRanges& ranges, const Auxiliary& wanted) {
  const ForwardKernels& kernels = select(params.k_dtype);
  const MaskBlocks masks(params, ranges, pool);
  const Schedule schedule =
      make_schedule(params, masks, batch_invariant, kernels.limits, pool.num_threads);
  if (params.q_offsets != nullptr) fill_tokens_of_no_sequence(params);
  for (const int32_t head : schedule.invalid_heads) fill_head_with_nan(params, head);
  const AuxiliaryWork auxiliary(params, schedule, wanted);
  if (schedule.tasks.empty()) return auxiliary.finish(schedule);

  AlignedFloats partials(schedule.partial_floats);
  const auto unfinished = std::make_unique<std::atomic<int32_t>[]>(schedule.num_merges);
  for (const Task& task : schedule.tasks) {
    if (task.merge >= 0) unfinished[task.merge].store(task.num_splits, std::memory_order_relaxed);
  }
  int64_t floats = 0;  // a whole number of cache lines
  for (const Bundle& bundle : schedule.bundles) {
    floats = std::max(floats, kernels.scratch_floats(params, schedule, bundle));
  }
  const int64_t worker_floats = floats + auxiliary.worker_floats();
  AlignedFloats scratch(schedule.num_workers * worker_floats);

  const CallState call{params,           masks,     schedule, partials.get(),
                       unfinished.get(), auxiliary, floats,   lse_wanted};
  Work work{call, kernels.run_bundle[static_cast<int>(params.k_dtype)], scratch.get(),
            worker_floats};
  run_workers(pool, schedule.num_workers, work);
  auxiliary.finish(schedule);
}

}  // namespace gqa::cpu
