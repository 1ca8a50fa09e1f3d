// Shapes of the decode kernel: tiles, pipeline and shared memory of each head-dim class.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../../../core/params.h"

namespace gqa::cuda::sm80 {

constexpr int kDecodeRows = 16;  // of a tile: query heads of one group x query tokens
constexpr int kDecodeWarps = 4;
constexpr int kWarpKeys = 16;                           // of a block, for one warp
constexpr int kDecodeBlock = kDecodeWarps * kWarpKeys;  // keys
constexpr int kDecodeThreads = kDecodeWarps * 32;

// kD: the class, 64, 128 or 256; D and Dv are at most kD and padded with zeros in shared memory.
//
// | class | stages | shared bytes | CTAs per SM on A100 / H100 |
// |    64 |      3 |       51,200 |                      3 / 4 |
// |   128 |      2 |       69,632 |                      2 / 3 |
// |   256 |      1 |       75,776 |                      2 / 2 |
//
// One stage is a pipeline too: K of the next block is copied while the product with V runs.
template <int kD>
struct DecodeConfig {
  static constexpr int kRowBytes = kD * 2;
  static constexpr int kStages = kD == 64 ? 3 : kD == 128 ? 2 : 1;
  static constexpr int kTileBytes = kWarpKeys * kRowBytes;  // one warp's K, or V, of a stage
  static constexpr int kStageBytes = kDecodeWarps * 2 * kTileBytes;
  static constexpr int kQBytes = kDecodeRows * kRowBytes;
  // The warps' outputs lie where the stages were: fp32, rows 8 floats apart from a multiple of the
  // banks, so that pairs are stored without conflicts.
  static constexpr int kOutStride = kD + 8;
  static constexpr int kMergeBytes = kDecodeWarps * kDecodeRows * kOutStride * 4;
  static constexpr int kLoopBytes = kStages * kStageBytes;
  static constexpr int kQBegin = kLoopBytes > kMergeBytes ? kLoopBytes : kMergeBytes;
  static constexpr int kSharedBytes = kQBegin + kQBytes;
  static constexpr int kMinCtas = kD == 256 ? 2 : 3;  // per SM, for the registers
  static constexpr bool kQInRegisters = kD <= 128;
};

// What a kernel is compiled for.
enum class DecodeVariant {
  kPlain,    // scores are only scaled (scale > 0), hidden by length, causal order and window
  kGeneral,  // every option
  kElements  // every option, and rows that 16-byte copies can't take
};

struct DecodeParams {
  AttentionParams attention;
  float* partial_out;  // [splits, B, Hq, Sq, partial_stride], normalised; nullptr where splits is 1
  float* partial_lse;  // [splits, B, Hq, Sq], in base 2, without sinks
  int tiles, splits;   // of a sequence; of the keys of a tile
  int partial_stride;  // Dv rounded up to whole 16-byte vectors
};

// Launches the kernel and, where keys are split, the merge. One .cu file per (T, kD).
template <class T, int kD>
void launch_decode(const DecodeParams& params, DecodeVariant variant, cudaStream_t stream);

}  // namespace gqa::cuda::sm80
