// Instantiates the kernels of one (T, kHeadDim): from parameters to a launch, with its descriptors
// and schedule.
#pragma once

#include <algorithm>

#include "../../launch.h"
#include "kernel.cuh"
#include "launch_choices.h"

namespace gqa::cuda::sm90 {

template <class T, class C, bool kScoreMods>
void launch_with(const AttentionParams& params, void* workspace, int num_sms, cudaStream_t stream) {
  const PrefillViews views = prefill_views(params);
  PrefillArguments arguments{};
  arguments.attention = params;
  arguments.q = make_tensor_map(views.q, params.dtype, C::kBlockM);
  arguments.out = make_tensor_map(views.out, params.dtype, 64);
  const int box_rows = key_box_rows(params, C::kBlockN);
  // Of an empty tensor nothing is loaded: any descriptor will do.
  arguments.k = arguments.v = arguments.q;
  if (!is_empty(views.k)) arguments.k = make_tensor_map(views.k, params.dtype, box_rows);
  if (!is_empty(views.v)) arguments.v = make_tensor_map(views.v, params.dtype, box_rows);
  arguments.schedule = make_schedule(params);
  arguments.box_rows = box_rows;
  arguments.by_page_size = page_divider(params.page_size);
  if (draws_tiles(params, num_sms)) {
    arguments.schedule.counter = static_cast<int*>(workspace);
    check(cudaMemsetAsync(workspace, 0, sizeof(int), stream), "cudaMemsetAsync(tile counter)");
  }
  launch_kernel("sm90 prefill", &prefill_kernel<T, C, kScoreMods>,
                dim3(std::min(max_tiles(params), num_sms)), C::kThreads, C::kSharedBytes, stream,
                arguments);
}

template <class T, int kHeadDim>
void launch_prefill(const AttentionParams& params, void* workspace, int num_sms,
                    cudaStream_t stream) {
  constexpr int kBlockN = kHeadDim == 256 ? 80 : 128;
  if (has_score_mods(params)) {
    return launch_with<T, Config<kHeadDim, kBlockN>, true>(params, workspace, num_sms, stream);
  }
  if constexpr (kHeadDim == 128) {
    // Wider blocks have fewer steps, but waste more at the diagonal, and need more boxes of pages.
    if (params.window_left < 0 && params.window_right < 0 && params.max_pages == 1) {
      return launch_with<T, Config<128, 176>, false>(params, workspace, num_sms, stream);
    }
  }
  launch_with<T, Config<kHeadDim, kBlockN>, false>(params, workspace, num_sms, stream);
}

}  // namespace gqa::cuda::sm90
