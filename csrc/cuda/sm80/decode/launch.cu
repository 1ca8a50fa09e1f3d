// Host side of the decode kernels: what they can run, how keys are cut into parts, which instance.
#include <algorithm>
#include <type_traits>

#include "../../../core/splits.h"
#include "../../common/group_rows.cuh"
#include "../../launch.h"
#include "combine.cuh"
#include "config.h"
#include "launch.h"
#include "part_rule.h"

namespace gqa::cuda::sm80 {
namespace {

int head_dim_class(const AttentionParams& a) {
  const int64_t dim = std::max(a.head_dim, a.value_head_dim);
  return dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
}

// Whether every row starts at a multiple of `bytes`; a dim of one index needs no stride.
bool aligned(const void* data, const Strides& strides, int64_t batch, int64_t heads, int64_t tokens,
             int64_t element_bytes, int64_t bytes) {
  const auto whole = [&](int64_t size, int64_t stride) {
    return size == 1 || stride * element_bytes % bytes == 0;
  };
  return reinterpret_cast<uintptr_t>(data) % bytes == 0 && whole(batch, strides.b) &&
         whole(heads, strides.h) && whole(tokens, strides.s);
}

bool rows_in_vectors(const AttentionParams& a) {
  const int64_t pages = a.page_table ? a.num_pages : a.batch;
  const int64_t slots = a.page_table ? a.page_size : a.kv_len;
  // With q_offsets, q_len is the longest sequence; the rows of q may be more.
  const int64_t tokens = a.q_offsets ? 2 : a.q_len, stored_bytes = is_quantized(a.k_dtype) ? 1 : 2;
  return aligned(a.q, a.q_stride, a.batch, a.num_heads, tokens, 2, 16) &&
         aligned(a.out, a.out_stride, a.batch, a.num_heads, tokens, 2, 8) &&
         aligned(a.k, a.k_stride, pages, a.num_k_heads, slots, stored_bytes, 16) &&
         aligned(a.v, a.v_stride, pages, a.num_v_heads, slots, stored_bytes, 16) &&
         a.value_head_dim % 4 == 0;
}

DecodeVariant variant_of(const DecodeParams& params) {
  const AttentionParams& a = params.attention;
  if (params.elements) return DecodeVariant::kElements;
  const bool plain =
      a.softcap == 0.f && a.alibi_slopes == nullptr && a.attn_mask == nullptr && a.scale > 0.f;
  return plain ? DecodeVariant::kPlain : DecodeVariant::kGeneral;
}

// The keys that a tile may see.
int64_t most_visible_keys(const AttentionParams& a) {
  if (a.window_left < 0 || a.window_right < 0) return a.kv_len;
  return std::min(a.kv_len, a.window_left + a.window_right + a.q_len);
}

// CTAs of the call's kernel that the device runs at once.
int64_t decode_slots(const AttentionParams& a, const Device& device) {
  const int bits = !is_quantized(a.k_dtype) ? 16 : a.k_dtype == DType::kInt4 ? 4 : 8;
  const auto slots = [&](auto config) {
    using C = decltype(config);
    return int64_t{device.num_sms} *
           ctas_per_sm(device, C::kSharedBytes + kStaticSharedBytes, C::kMinCtas);
  };
  const auto of_class = [&](auto dim) {
    constexpr int kD = decltype(dim)::value;
    return bits == 16  ? slots(DecodeConfig<kD, 16>())
           : bits == 8 ? slots(DecodeConfig<kD, 8>())
                       : slots(DecodeConfig<kD, 4>());
  };
  switch (head_dim_class(a)) {
    case 64: return of_class(std::integral_constant<int, 64>());
    case 128: return of_class(std::integral_constant<int, 128>());
    default: return of_class(std::integral_constant<int, 256>());
  }
}

// How the keys are split: `splits` and `parts`, and the arguments for splitting by lengths.
void cut_into_parts(DecodeParams& params, const Device& device) {
  const AttentionParams& a = params.attention;
  // The host does not know how many tiles a map fills. It is this many if no group is empty and
  // none has more partial tiles than necessary.
  const int64_t groups = std::min(a.num_heads, std::max(a.num_k_heads, a.num_v_heads));
  const int64_t tiles = std::max(groups, (a.num_heads * a.q_len + kDecodeRows - 1) / kDecodeRows);
  const int64_t slots = decode_slots(a, device);
  params.most_keys = most_visible_keys(a);
  const int64_t blocks = (params.most_keys + kDecodeBlock - 1) / kDecodeBlock;
  if (a.kv_lengths == nullptr || a.batch == 1) {
    params.splits = static_cast<int>(choose_splits(tiles * a.batch, blocks, slots));
    params.parts = static_cast<int>(params.splits * a.batch);
    return;
  }
  params.even_parts = even_parts(tiles, slots);
  const int64_t parts =
      std::min(params.even_parts + a.batch, parts_of(blocks, kMinBlocksPerSplit) * a.batch);
  params.parts = static_cast<int>(parts);
  params.splits = parts == a.batch ? 1 : 0;
}

// Parts of all sequences whose results are merged.
int64_t partial_parts(const DecodeParams& params) { return params.splits == 1 ? 0 : params.parts; }

DecodeParams decode_params(const AttentionParams& a, void* workspace, const Device& device) {
  DecodeParams params{};
  params.attention = a;
  params.tiles = static_cast<int>(most_group_tiles(a, kDecodeRows));
  cut_into_parts(params, device);
  params.partial_stride = static_cast<int>((a.value_head_dim + 3) / 4 * 4);
  params.elements = !rows_in_vectors(a);
  params.by_page_size = page_divider(a.page_size);
  if (partial_parts(params) > 0) {
    const int64_t rows = partial_parts(params) * a.num_heads * a.q_len;
    params.partial_out = static_cast<float*>(workspace);
    params.partial_lse = params.partial_out + rows * params.partial_stride;
    if (params.splits == 0) {
      params.sequence_parts = reinterpret_cast<int32_t*>(params.partial_lse + rows);
    }
  }
  return params;
}

template <class S>
void launch_class(const DecodeParams& params, cudaStream_t stream) {
  const DecodeVariant variant = variant_of(params);
  switch (head_dim_class(params.attention)) {
    case 64: return launch_decode<S, 64>(params, variant, stream);
    case 128: return launch_decode<S, 128>(params, variant, stream);
    default: return launch_decode<S, 256>(params, variant, stream);
  }
}

void launch_stored(const DecodeParams& params, cudaStream_t stream) {
  switch (params.attention.k_dtype) {
    case DType::kBFloat16: return launch_class<BFloat16>(params, stream);
    case DType::kFloat8E4M3: return launch_class<Float8E4M3>(params, stream);
    case DType::kFloat8E5M2: return launch_class<Float8E5M2>(params, stream);
    case DType::kInt8: return launch_class<Int8>(params, stream);
    case DType::kInt4: return launch_class<Int4Pair>(params, stream);
    default: return launch_class<Float16>(params, stream);
  }
}

}  // namespace

std::string decode_unsupported(const AttentionParams& a) {
  const auto is = [](const char* name, int64_t value, const char* rule) {
    return std::string(name) + " must be " + rule + ", got " + std::to_string(value);
  };
  if (a.dtype != DType::kBFloat16 && a.dtype != DType::kFloat16) {
    return "dtype must be bfloat16 or float16";
  }
  if (a.k_dtype != a.v_dtype || (a.k_dtype != a.dtype && !is_quantized(a.k_dtype))) {
    return "k and v must have q's dtype or one quantised dtype";
  }
  if (a.head_dim < 1 || a.head_dim > 256) return is("D", a.head_dim, "1 to 256");
  if (a.value_head_dim < 1 || a.value_head_dim > 256) return is("Dv", a.value_head_dim, "1 to 256");
  if (a.num_heads > kMaxHeads) return is("Hq", a.num_heads, "at most 8192");
  if (a.num_k_heads * a.num_v_heads > INT32_MAX) {
    return is("Hk * Hv", a.num_k_heads * a.num_v_heads, "below 2^31");
  }
  // Pages are asked for up to seven blocks beyond the last key.
  if (a.kv_len + a.q_len > INT32_MAX - 1024) {
    return is("Sk + Sq", a.kv_len + a.q_len, "below 2^31 - 1024");
  }
  if (a.dropout_threshold != 0) return "dropout_p must be 0";
  const int64_t ctas = most_group_tiles(a, kDecodeRows) * a.batch;
  if (ctas > INT32_MAX) return is("the number of row tiles", ctas, "below 2^31");
  if (a.batch * a.num_heads * a.q_len > INT32_MAX) {
    return is("B * Hq * Sq", a.batch * a.num_heads * a.q_len, "below 2^31");
  }
  return "";
}

bool decode_supported(const AttentionParams& params) { return decode_unsupported(params).empty(); }

size_t decode_workspace_bytes(const AttentionParams& a, const Device& device) {
  const DecodeParams params = decode_params(a, nullptr, device);
  const int64_t parts = partial_parts(params);
  if (parts == 0) return 0;
  const int64_t numbers = params.splits == 0 ? 2 * a.batch : 0;  // sequence_parts
  return sizeof(float) * parts * a.num_heads * a.q_len * (params.partial_stride + 1) +
         sizeof(int32_t) * numbers;
}

void decode(const AttentionParams& a, void* workspace, const Device& device, cudaStream_t stream) {
  const std::string reason = decode_unsupported(a);
  if (!reason.empty()) throw std::runtime_error("sm80 decode: " + reason);
  if (a.batch * a.num_heads * a.q_len == 0) return;
  const DecodeParams params = decode_params(a, workspace, device);
  launch_stored(params, stream);
  if (partial_parts(params) == 0) return;
  const int64_t rows = a.batch * a.num_heads * a.q_len;
  launch_kernel_after("sm80 decode combine", combine_kernel,
                      dim3(static_cast<unsigned>((rows + kCombineWarps - 1) / kCombineWarps)),
                      kCombineWarps * 32, stream, params);
}

}  // namespace gqa::cuda::sm80
