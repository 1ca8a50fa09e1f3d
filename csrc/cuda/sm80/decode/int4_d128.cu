#include "unit.cuh"

template void gqa::cuda::sm80::launch_decode<gqa::Int4Pair, 128>(const DecodeParams&, DecodeVariant,
                                                                 cudaStream_t);
