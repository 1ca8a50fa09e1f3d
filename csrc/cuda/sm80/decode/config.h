// Shapes of the decode kernel: tiles, pipeline and shared memory of each head-dim class.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../../../core/params.h"
#include "../../common/page_divider.h"

namespace gqa::cuda::sm80 {

constexpr int kDecodeRows = 16;  // of a tile: query heads of one group x query tokens
constexpr int kDecodeWarps = 4;
constexpr int kWarpKeys = 16;                           // of a block, for one warp
constexpr int kDecodeBlock = kDecodeWarps * kWarpKeys;  // keys
constexpr int kDecodeThreads = kDecodeWarps * 32;
constexpr int kStaticSharedBytes = 1280;  // at most: rows, sums and the search for the tile
constexpr int kMaxHeads = 8192;           // their numbers fit into the shared memory of every class

// kD: the class, 64, 128 or 256; D and Dv are at most kD and padded with zeros in shared memory.
// kBits: of a number of K and V as they are stored, which is how they lie in shared memory, too.
//
// | class, bits | stages | shared bytes | CTAs per SM on A100 / H100, at most |
// |      64, 16 |      3 |       51,200 |                               3 / 4 |
// |     128, 16 |      2 |       69,632 |                               2 / 3 |
// |     256, 16 |      1 |       75,776 |                               2 / 2 |
// |       64, 8 |      4 |       38,912 |                               4 / 5 |
// |      128, 8 |      2 |       40,960 |                               4 / 5 |
// |      256, 8 |      2 |       77,824 |                               2 / 2 |
// |       64, 4 |      6 |       32,768 |                               4 / 6 |
// |      128, 4 |      4 |       40,960 |                               4 / 5 |
// |      256, 4 |      4 |       77,824 |                               2 / 2 |
//
// One stage is a pipeline too: K of the next block is copied while the product with V runs.
template <int kHeadDim, int kStoredBits>
struct DecodeConfig {
  static constexpr int kD = kHeadDim, kBits = kStoredBits;
  static constexpr bool kQuantized = kBits < 16;
  static constexpr int kRowBytes = kD * kBits / 8;  // of K and V
  static constexpr int kStages = kBits == 16  ? (kD == 64    ? 3
                                                 : kD == 128 ? 2
                                                             : 1)
                                 : kBits == 8 ? (kD == 64 ? 4 : 2)
                                              : (kD == 64 ? 6 : 4);
  static constexpr int kTileBytes = kWarpKeys * kRowBytes;  // one warp's K, or V, of a stage
  // Scales and zeros of one warp's keys, of K and of V.
  static constexpr int kNumberBytes = kQuantized ? kWarpKeys * 4 * 4 : 0;
  static constexpr int kWarpBytes = 2 * kTileBytes + kNumberBytes;
  static constexpr int kStageBytes = kDecodeWarps * kWarpBytes;
  static constexpr int kQRowBytes = kD * 2;
  static constexpr int kQBytes = kDecodeRows * kQRowBytes;
  // The warps' outputs lie where the stages were: fp32, rows as many floats apart from a multiple
  // of the banks as lets a warp store its pieces (pairs, or four) without conflicts.
  static constexpr int kOutStride = kD + (kBits == 16 ? 8 : kBits == 8 ? 16 : 4);
  static constexpr int kMergeBytes = kDecodeWarps * kDecodeRows * kOutStride * 4;
  static constexpr int kLoopBytes = kStages * kStageBytes;
  static constexpr int kQBegin = kLoopBytes > kMergeBytes ? kLoopBytes : kMergeBytes;
  static constexpr int kSharedBytes = kQBegin + kQBytes;
  static constexpr int kMinCtas = kD == 256 ? 2 : 3;  // per SM, for the registers
  // Quantised kernels of class 128 need its registers for scales, zeros and rows of q beside them.
  static constexpr bool kQInRegisters = kD == 64 || (kD == 128 && !kQuantized);
  static_assert(kSharedBytes >= kMaxHeads * 4, "the search for the tile lists all heads");
};

template <class S>
inline constexpr int kStoredBits = 8 * sizeof(S) / kNumbersPerElement<S>;

// The options that a kernel is compiled for.
enum class DecodeVariant {
  kPlain,    // scores are only scaled (scale > 0), hidden by length, causal order and window
  kGeneral,  // every option
  kElements  // every option, and rows that 16-byte copies can't take
};

struct DecodeParams {
  AttentionParams attention;
  // Of every part of the keys of a sequence; nullptr if no sequence is cut.
  float* partial_out;  // [parts, Hq, Sq, partial_stride], normalised
  float* partial_lse;  // [parts, Hq, Sq], in base 2, without sinks
  int tiles;           // of a sequence
  int splits;          // of each sequence, part s * B + b is split s of sequence b; 0: by lengths
  int parts;           // of all sequences, at most
  // If sequences are cut by their lengths (parts.cuh): how many parts there would be without
  // rounding, the keys of a sequence that count, and where each sequence's parts are found.
  int64_t even_parts, most_keys;
  int32_t* sequence_parts;  // [B, 2]: the first of its parts, and how many
  int partial_stride;       // Dv rounded up to whole 16-byte vectors
  bool elements;            // some rows are such that 16-byte copies can't take them
  PageDivider by_page_size;
};

// Launches the kernel. S is what K and V are stored as; quantised ones have one kernel for all
// variants. One .cu file per (S, kD), but for the quantised ones of a class, which share one.
template <class S, int kD>
void launch_decode(const DecodeParams& params, DecodeVariant variant, cudaStream_t stream);

}  // namespace gqa::cuda::sm80
