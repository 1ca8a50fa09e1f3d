// The backward kernels on the instruction set that the including file has chosen, for
// every type of q. The constants instantiate the templates here, while the instruction set is
// switched on.
#include "begin.h"

#include "../backward/kernel.h"

namespace gqa::cpu::GQA_ISA {
namespace {

constexpr auto kScratchFloats = backward_scratch_floats<Vec>;
constexpr auto kSumWidths = backward_sum_widths<Vec>;
constexpr std::array<BackwardFunction, 3> kRunTask = {run_backward_task<Vec, float>,
                                                      run_backward_task<Vec, BFloat16>,
                                                      run_backward_task<Vec, Float16>};
constexpr std::array<StoreSumsFunction, 3> kStoreSums = {store_backward_sums<Vec, float>,
                                                         store_backward_sums<Vec, BFloat16>,
                                                         store_backward_sums<Vec, Float16>};

}  // namespace
}  // namespace gqa::cpu::GQA_ISA

#include "end.h"
