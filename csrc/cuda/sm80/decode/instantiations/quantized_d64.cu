#include "../instantiate.cuh"

namespace gqa::cuda::sm80 {

template void launch_decode<Float8E4M3, 64>(const DecodeParams&, DecodeVariant, cudaStream_t);
template void launch_decode<Float8E5M2, 64>(const DecodeParams&, DecodeVariant, cudaStream_t);
template void launch_decode<Int8, 64>(const DecodeParams&, DecodeVariant, cudaStream_t);
template void launch_decode<Int4Pair, 64>(const DecodeParams&, DecodeVariant, cudaStream_t);

}  // namespace gqa::cuda::sm80
