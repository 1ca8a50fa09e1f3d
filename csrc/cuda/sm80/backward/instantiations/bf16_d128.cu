#include "../instantiate.cuh"

template void gqa::cuda::sm80::launch_backward_kv<gqa::BFloat16, 128>(const BackwardArgs&, bool,
                                                                      unsigned, cudaStream_t);
template void gqa::cuda::sm80::launch_backward_q<gqa::BFloat16, 128>(const BackwardArgs&, bool,
                                                                     unsigned, cudaStream_t);
