// The bf16 forward kernels for x86-64 with AMX tiles.
#include "cpu_features.h"

#if defined(GQA_HAVE_AMX)
#include "amx.h"

#include "begin.h"

#include "../forward/engine_amx.h"
#include "../forward/kernel.h"
#include "../forward/products_amx.h"
#include "../forward/products_pairs.h"

namespace gqa::cpu::amx {
namespace {

using Few = DirectProducts<Vec, BFloat16>;
using FewOnTiles = AmxDirectProducts<Vec>;
using Many = PairProducts<Vec, AmxEngine<Vec>>;

// Fewer rows take as many instructions without tiles, and then their scores need no transposition.
// All tasks of a call do the same, so that results do not depend on how the tasks are bundled.
constexpr int kMinTileRows = 5;

void run_with_tiles(const CallState& call, const Bundle& bundle, float* scratch) {
  if (!call.schedule.tile.packs && call.schedule.tile.rows < kMinTileRows) {
    return run_bundle<Vec, BFloat16, BFloat16, Few, Few>(call, bundle, scratch);
  }
  const AmxTiles tiles;
  run_bundle<Vec, BFloat16, BFloat16, FewOnTiles, Many>(call, bundle, scratch);
}

constexpr ByStorage<BundleFunction> kRunBundle = {nullptr, run_with_tiles};
constexpr auto kScratchFloats = scratch_floats<Vec, Many>;

}  // namespace
}  // namespace gqa::cpu::amx

#include "end.h"

const gqa::cpu::ForwardKernels gqa::cpu::kAmxForward = {Isa::kAmx, kAmxTiles, amx::kScratchFloats,
                                                        amx::kRunBundle};
#endif
