// Host side of the backward kernels: what they can run, which instances, how many CTAs.
#include <algorithm>

#include "../../common/softmax.cuh"
#include "../../launch.h"
#include "../query_tile.cuh"
#include "args.h"
#include "config.h"
#include "launch.h"

namespace gqa::cuda::sm80 {

template <class T, int kD>
void launch_backward_kv(const BackwardArgs& args, bool general, unsigned ctas, cudaStream_t stream);
template <class T, int kD>
void launch_backward_q(const BackwardArgs& args, bool general, unsigned ctas, cudaStream_t stream);
void launch_numbers(const BackwardArgs& args, unsigned ctas, cudaStream_t stream);
void launch_sinks(const BackwardArgs& args, unsigned ctas, cudaStream_t stream);
void launch_slopes(const BackwardArgs& args, unsigned ctas, cudaStream_t stream);

namespace {

int64_t blocks_of(int64_t rows, int64_t block) { return (rows + block - 1) / block; }

// f(type, config) for the call's instance.
template <class F>
auto with_instance(const AttentionParams& call, F f) {
  const auto with_type = [&](auto config) {
    return call.dtype == DType::kBFloat16 ? f(BFloat16(), config) : f(Float16(), config);
  };
  const int64_t dim = std::max(call.head_dim, call.value_head_dim);
  if (dim <= 64) return with_type(BackwardConfig<64>());
  if (dim <= 128) return with_type(BackwardConfig<128>());
  return with_type(BackwardConfig<256>());
}

struct Sizes {
  int64_t padded_len, number_blocks, q_blocks, kv_blocks;
  int64_t numbers;  // RowNumbers of all heads
  int64_t numbers_ctas, q_ctas, kv_ctas;
};

Sizes sizes_of(const BackwardParams& params) {
  const AttentionParams& call = params.call;
  const int64_t block =
      with_instance(call, [](auto, auto config) { return int64_t{decltype(config)::kBlockM}; });
  const int64_t pairs = call.batch * call.num_heads;
  Sizes sizes;
  sizes.number_blocks = blocks_of(call.q_len, kNumbersBlock);
  // What first_numbers needs: of packed sequences, a block more for each.
  const bool packed = call.q_offsets != nullptr;
  const int64_t blocks = packed ? call.q_tokens / kNumbersBlock + call.batch : sizes.number_blocks;
  sizes.padded_len = blocks * kNumbersBlock;
  sizes.numbers = (packed ? call.num_heads : pairs) * sizes.padded_len;
  sizes.q_blocks = blocks_of(call.q_len, block);
  sizes.kv_blocks = blocks_of(params.max_kv_len, block);
  sizes.numbers_ctas = pairs * sizes.number_blocks;
  sizes.q_ctas = pairs * sizes.q_blocks;
  sizes.kv_ctas = call.batch * sizes.kv_blocks * std::max(call.num_k_heads, call.num_v_heads);
  return sizes;
}

// Whether scores need more than a positive scale, or probabilities need dropout.
bool modifies_scores(const AttentionParams& call) {
  return !(call.scale > 0.0f) || call.softcap != 0.0f || call.alibi_slopes != nullptr ||
         call.attn_mask != nullptr || call.dropout_threshold != 0;
}

bool wants_sums(const BackwardParams& params) {
  return params.dslopes != nullptr || params.dsinks != nullptr;
}

unsigned count(int64_t ctas) { return static_cast<unsigned>(ctas); }

// One launch over the groups of the key heads, or of the value heads; dk or dv may be nullptr.
void sum_over_groups(BackwardArgs args, bool by_value, void* dk, void* dv, bool general,
                     cudaStream_t stream) {
  const AttentionParams& call = args.params.call;
  args.by_value = by_value;
  args.params.dk = dk;
  args.params.dv = dv;
  const int64_t groups = by_value ? call.num_v_heads : call.num_k_heads;
  const int64_t ctas = sizes_of(args.params).kv_blocks * call.batch * groups;
  if (ctas == 0) return;
  with_instance(call, [&](auto type, auto config) {
    launch_backward_kv<decltype(type), decltype(config)::kD>(args, general, count(ctas), stream);
  });
}

}  // namespace

std::string backward_unsupported(const BackwardParams& params) {
  const AttentionParams& call = params.call;
  const auto is = [](const char* name, int64_t value, const char* rule) {
    return std::string(name) + " must be " + rule + ", got " + std::to_string(value);
  };
  if (call.dtype != DType::kBFloat16 && call.dtype != DType::kFloat16) {
    return "dtype must be bfloat16 or float16";
  }
  if (call.k_dtype != call.dtype || call.v_dtype != call.dtype) {
    return "k and v must have q's dtype";
  }
  if (call.page_table != nullptr || (call.kv_begin != nullptr) != (call.q_offsets != nullptr)) {
    return "k and v must be dense or packed, not a cache";
  }
  if (call.attn_mask != nullptr && call.q_offsets != nullptr) {
    return "attn_mask must not be given with packed sequences";
  }
  if (call.head_dim < 1 || call.head_dim > 256) return is("D", call.head_dim, "1 to 256");
  if (call.value_head_dim < 1 || call.value_head_dim > 256) {
    return is("Dv", call.value_head_dim, "1 to 256");
  }
  for (const auto& [name, heads] :
       {std::pair{"Hq", call.num_heads}, {"Hk", call.num_k_heads}, {"Hv", call.num_v_heads}}) {
    if (heads > kMaxBackwardHeads) return is(name, heads, "at most 8192");
  }
  if (call.kv_len + call.q_len > INT32_MAX - 1024) {
    return is("Sk + Sq", call.kv_len + call.q_len, "below 2^31 - 1024");
  }
  const Sizes sizes = sizes_of(params);
  const int64_t most = std::max({sizes.numbers_ctas, sizes.q_ctas, sizes.kv_ctas});
  if (most > INT32_MAX) return is("the number of tiles", most, "below 2^31");
  return "";
}

bool backward_supported(const BackwardParams& params) {
  return backward_unsupported(params).empty();
}

size_t backward_workspace_bytes(const BackwardParams& params, const Device&) {
  const Sizes sizes = sizes_of(params);
  const int64_t head_sums = wants_sums(params) ? sizes.q_ctas : 0;
  return sizes.numbers * sizeof(RowNumbers) + head_sums * sizeof(HeadSums);
}

void backward(const BackwardParams& params, void* workspace, const Device&, cudaStream_t stream) {
  const std::string reason = backward_unsupported(params);
  if (!reason.empty()) throw std::runtime_error("sm80 backward: " + reason);
  const AttentionParams& call = params.call;
  const Sizes sizes = sizes_of(params);
  BackwardArgs args{};
  args.params = params;
  args.numbers = static_cast<RowNumbers*>(workspace);
  args.padded_len = sizes.padded_len;
  args.number_blocks = sizes.number_blocks;
  if (wants_sums(params)) {
    args.head_sums = reinterpret_cast<HeadSums*>(args.numbers + sizes.numbers);
  }
  args.sum_blocks = sizes.q_blocks;
  const bool dout_in_chunks = in_chunks(params.dout, params.dout_stride, call.value_head_dim);
  args.elements = !(in_chunks(call.q, call.q_stride, call.head_dim) &&
                    in_chunks(call.k, call.k_stride, call.head_dim) &&
                    in_chunks(call.v, call.v_stride, call.value_head_dim) && dout_in_chunks);
  args.out_elements =
      !(in_chunks(call.out, call.out_stride, call.value_head_dim) && dout_in_chunks);
  const bool general = args.elements || modifies_scores(call);
  args.softmax_scale = call.scale * kLog2e;
  args.shared = call.value_head_map == nullptr;

  if (sizes.numbers_ctas > 0) launch_numbers(args, count(sizes.numbers_ctas), stream);
  const bool both =
      with_instance(call, [](auto, auto config) { return bool{decltype(config)::kBothGradients}; });
  if (args.shared && both) {
    sum_over_groups(args, false, params.dk, params.dv, general, stream);
  } else {
    sum_over_groups(args, false, params.dk, nullptr, general, stream);
    sum_over_groups(args, !args.shared, nullptr, params.dv, general, stream);
  }
  if (sizes.q_ctas > 0) {
    args.section_pairs = section_pairs(call);
    with_instance(call, [&](auto type, auto config) {
      launch_backward_q<decltype(type), decltype(config)::kD>(args, general, count(sizes.q_ctas),
                                                              stream);
    });
  }
  if (params.dsinks != nullptr && call.num_heads > 0) {
    launch_sinks(args, count(call.num_heads), stream);
  }
  if (params.dslopes != nullptr && call.batch * call.num_heads > 0) {
    launch_slopes(args, count(call.batch * call.num_heads), stream);
  }
}

}  // namespace gqa::cuda::sm80
