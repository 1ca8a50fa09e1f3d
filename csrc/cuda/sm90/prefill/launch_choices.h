// The host's decisions about a prefill call on Hopper, from shapes only.
#pragma once

#include "../../../core/params.h"
#include "../scheduler.cuh"
#include "tensor_map.h"

namespace gqa::cuda::sm90 {

// The tensors in the form that TMA describes.
struct PrefillViews {
  TensorView q, k, v, out;
};
PrefillViews prefill_views(const AttentionParams& params);

// Whether options change scores, and not only which of them are visible.
bool has_score_mods(const AttentionParams& params);

// 64, 128 or 256: the kernel's columns for D and Dv; and the rows of its tiles.
int head_dim_class(const AttentionParams& params);
int tile_rows(const AttentionParams& params);

// Rows of the boxes that blocks of `block_keys` keys are loaded in: no box lies in two pages.
int key_box_rows(const AttentionParams& params, int block_keys);

// Tiles; of packed sequences, whose lengths only the device knows, no less than there are.
int max_tiles(const AttentionParams& params);
// Without its counter.
Schedule make_schedule(const AttentionParams& params);
// Whether CTAs draw tiles from a counter: where tiles differ in length and a CTA does several.
bool draws_tiles(const AttentionParams& params, int num_sms);

}  // namespace gqa::cuda::sm90
