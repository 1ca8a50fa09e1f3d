// Attention of many query tokens on Hopper (sm_90a): TMA, wgmma, warp specialisation.
//
// Grid      1-D, any size; persistent CTAs, see ../scheduler.cuh. A tile is kBlockM query tokens of
//           one query head.
// Map       head_map[h] enters only as the head coordinate at which TMA loads K and V: uneven,
//           interleaved and empty groups cost nothing. An entry out of range loads nothing and
//           gives NaN.
// Pages     a block of keys is one box of K and one of V, or as many as the pages it lies in need.
// Warps     warpgroup 0 produces (producer.cuh), the others consume (consumer.cuh). Registers
//           move from the former to the latter.
// Pipeline  K and V blocks in two stages each, without a pause between tiles. Blocks go from the
//           last to the first, so that the block with the end of the keys comes first.
// Shared    config.h.
//
// After FlashAttention-3 (Shah et al., 2024, arXiv:2407.08608): sections 3.1, warp specialisation
// and turns ("ping-pong"), and 3.2, softmax overlapped with products within a warpgroup.
#pragma once

#include "consumer.cuh"
#include "producer.cuh"

namespace gqa::cuda::sm90 {

template <class T, class C, bool kScoreMods>
__global__ void __launch_bounds__(C::kThreads, 1)
    prefill_kernel(const __grid_constant__ PrefillArguments arguments) {
  extern __shared__ __align__(1024) uint8_t shared[];
  uint8_t* aligned = shared + (-smem_u32(shared) & 1023u);  // the swizzle follows the address
  const uint32_t base = smem_u32(aligned);
  Tile* tiles = reinterpret_cast<Tile*>(aligned + C::kTiles);
  uint16_t* order = reinterpret_cast<uint16_t*>(aligned + C::kOrder);

  const AttentionParams& params = arguments.attention;
  order_heads(params.head_map, params.value_head_map, static_cast<int>(params.num_heads),
              static_cast<int>(params.num_k_heads), static_cast<int>(params.num_v_heads),
              reinterpret_cast<int*>(aligned), order);
  if (threadIdx.x == 0) {
    // An arrival per consumer warp when it has read a buffer; where O takes Q's place, one per
    // consumer when its O has left.
    Ring<1>{base + C::kQRing}.init(C::kOwnO ? 4 * C::kConsumers : C::kConsumers);
    Ring<kStages>{base + C::kKRing}.init(4 * C::kConsumers);
    Ring<kStages>{base + C::kVRing}.init(4 * C::kConsumers);
    fence_mbarrier_init();
  }
  fence_async_proxy();  // order_heads used the tiles' memory
  __syncthreads();

  if (__shfl_sync(~0u, threadIdx.x / 128, 0) == 0) {
    give_registers<C::kProducerRegisters>();
    if (threadIdx.x < 32) produce<C>(arguments, base, tiles, order);
  } else {
    take_registers<C::kConsumerRegisters>();
    consume<T, C, kScoreMods>(arguments, base, tiles);
  }
}

}  // namespace gqa::cuda::sm90
