// How much scratch memory the tasks of a bundle need.
#pragma once

#include <cstdint>

#include "kernel_table.h"
#include "products_packed.h"
#include "schedule.h"
#include "tile.h"

namespace gqa::cpu::GQA_ISA {

// The scratch memory of run_bundle (kernel.h), for tasks with the products Many.
template <class V, class Many = PackedProducts<V, float>>
int64_t scratch_floats(const AttentionParams& params, const Schedule& schedule,
                       const Bundle& bundle) {
  int64_t floats = 0;
  for (int i = 0; i < bundle.count; ++i) {
    const TileLayout<V> layout(params, schedule.tile, Many::kBlocks,
                               schedule.tasks[bundle.first + i].num_rows());
    if (i == 0) floats += layout.shared_floats();
    floats += layout.own_floats();
  }
  return floats;
}

}  // namespace gqa::cpu::GQA_ISA
