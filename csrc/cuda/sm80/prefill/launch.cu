// Host side of the prefill kernels: what they can run, which instance, how many CTAs.
#include <algorithm>

#include "../../common/softmax.cuh"
#include "../../launch.h"
#include "args.h"
#include "config.h"
#include "launch.h"

namespace gqa::cuda::sm80 {

template <class T, int kD>
void launch_prefill(const PrefillArgs& args, bool general, unsigned ctas, cudaStream_t stream);

template <class T, int kD>
void launch_quantized_prefill(const PrefillArgs& args, unsigned ctas, cudaStream_t stream);

namespace {

constexpr int64_t kMaxHeads = 8192;  // their numbers fit into the shared memory of every class

int head_dim_class(const AttentionParams& params) {
  const int64_t dim = std::max(params.head_dim, params.value_head_dim);
  return dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
}

template <class F>
auto with_class(const AttentionParams& params, F f) {
  switch (head_dim_class(params)) {
    case 64: return f(PrefillConfig<64>());
    case 128: return f(PrefillConfig<128>());
    default: return f(PrefillConfig<256>());
  }
}

int64_t num_ctas(const AttentionParams& params) {
  const int64_t rows = with_class(params, [](auto config) { return decltype(config)::kBlockM; });
  return (params.q_len + rows - 1) / rows * params.batch * params.num_heads;
}

bool rows_in_chunks(const AttentionParams& params) {
  if (!in_chunks(params.q, params.q_stride, params.head_dim)) return false;
  if (is_quantized(params.k_dtype)) {
    const int64_t piece = params.k_dtype == DType::kInt4 ? 8 : 16;  // bytes of sixteen numbers
    const auto in_pieces = [&](const void* data, const Strides& strides) {
      return reinterpret_cast<uintptr_t>(data) % piece == 0 && strides.b % piece == 0 &&
             strides.h % piece == 0 && strides.s % piece == 0;
    };
    return in_pieces(params.k, params.k_stride) && in_pieces(params.v, params.v_stride);
  }
  return in_chunks(params.k, params.k_stride, params.head_dim) &&
         in_chunks(params.v, params.v_stride, params.value_head_dim);
}

// Whether scores need more than a positive scale, or probabilities need dropout.
bool modifies_scores(const AttentionParams& params) {
  return !(params.scale > 0.0f) || params.softcap != 0.0f || params.alibi_slopes != nullptr ||
         params.attn_mask != nullptr || params.dropout_threshold != 0;
}

template <class T>
void launch(const PrefillArgs& args, bool general, unsigned ctas, cudaStream_t stream) {
  with_class(args.params, [&](auto config) {
    constexpr int kD = decltype(config)::kD;
    if (is_quantized(args.params.k_dtype)) {
      launch_quantized_prefill<T, kD>(args, ctas, stream);
    } else {
      launch_prefill<T, kD>(args, general, ctas, stream);
    }
  });
}

}  // namespace

std::string prefill_unsupported(const AttentionParams& params) {
  const auto is = [](const char* name, int64_t value, const char* rule) {
    return std::string(name) + " must be " + rule + ", got " + std::to_string(value);
  };
  if (params.dtype != DType::kBFloat16 && params.dtype != DType::kFloat16) {
    return "dtype must be bfloat16 or float16";
  }
  if (params.k_dtype != params.v_dtype ||
      (params.k_dtype != params.dtype && !is_quantized(params.k_dtype))) {
    return "k and v must have q's dtype or one quantised dtype";
  }
  if (params.head_dim < 1 || params.head_dim > 256) return is("D", params.head_dim, "1 to 256");
  if (params.value_head_dim < 1 || params.value_head_dim > 256) {
    return is("Dv", params.value_head_dim, "1 to 256");
  }
  if (params.num_heads > kMaxHeads) return is("Hq", params.num_heads, "at most 8192");
  if (params.num_k_heads * params.num_v_heads > INT32_MAX) {
    return is("Hk * Hv", params.num_k_heads * params.num_v_heads, "below 2^31");
  }
  if (params.kv_len + params.q_len > INT32_MAX - 1024) {
    return is("Sk + Sq", params.kv_len + params.q_len, "below 2^31 - 1024");
  }
  if (num_ctas(params) > INT32_MAX)
    return is("the number of tiles", num_ctas(params), "below 2^31");
  if (params.attn_mask != nullptr && params.q_offsets != nullptr) {
    return "attn_mask must not be given with packed sequences";
  }
  return "";
}

bool prefill_supported(const AttentionParams& params) {
  return prefill_unsupported(params).empty();
}

size_t prefill_workspace_bytes(const AttentionParams&, const Device&) { return 0; }

void prefill(const AttentionParams& params, void*, const Device&, cudaStream_t stream) {
  const std::string reason = prefill_unsupported(params);
  if (!reason.empty()) throw std::runtime_error("sm80 prefill: " + reason);
  const int64_t ctas = num_ctas(params);
  if (ctas == 0) return;
  PrefillArgs args{};
  args.params = params;
  args.elements = !rows_in_chunks(params);
  const bool general = is_quantized(params.k_dtype) || args.elements || modifies_scores(params);
  args.softmax_scale = general ? 1.0f : params.scale * kLog2e;  // the general kernel has scaled
  args.section_pairs = section_pairs(params);
  args.by_page_size = page_divider(params.page_size);
  if (params.dtype == DType::kBFloat16) {
    launch<BFloat16>(args, general, static_cast<unsigned>(ctas), stream);
  } else {
    launch<Float16>(args, general, static_cast<unsigned>(ctas), stream);
  }
}

}  // namespace gqa::cuda::sm80
