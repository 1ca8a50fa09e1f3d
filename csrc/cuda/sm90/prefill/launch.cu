// Host side of the Hopper prefill kernel: what it can run, which instance, in which order of tiles.
#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "config.h"
#include "launch.h"
#include "launch_choices.h"

namespace gqa::cuda::sm90 {

// kHeadDim: 64, 128 or 256. The parameters are supported and have tiles.
template <class T, int kHeadDim>
void launch_prefill(const AttentionParams& params, void* workspace, int num_sms,
                    cudaStream_t stream);

namespace {

// Of K and V that CTAs running together read; H100's L2 has 50 MB, part of which Q and O pass
// through.
constexpr int64_t kSectionBytes = int64_t{32} << 20;
// Positions are 32-bit in the kernel, and a position plus a window must be too.
constexpr int64_t kMaxLength = int64_t{1} << 29;

std::string with_value(const std::string& text, int64_t value) {
  return text + ", got " + std::to_string(value);
}

// Of packed sequences no less than there are.
int64_t count_tiles(const AttentionParams& params) {
  const int64_t rows = tile_rows(params);
  const int64_t blocks = params.batch * ((params.q_len + rows - 1) / rows);
  if (params.q_offsets == nullptr) return params.num_heads * blocks;
  return params.num_heads * std::min(blocks, params.q_tokens / rows + params.batch);
}

}  // namespace

PrefillViews prefill_views(const AttentionParams& p) {
  const bool packed = p.q_offsets != nullptr, paged = p.page_table != nullptr;
  const int64_t batch = packed ? 1 : p.batch, tokens = packed ? p.q_tokens : p.q_len;
  const int64_t pages = paged ? p.num_pages : share_storage(p) ? 1 : p.batch;
  const int64_t slots = paged ? p.page_size : p.kv_len;
  return {{"q", p.q, p.q_stride, batch, p.num_heads, tokens, p.head_dim},
          {"k", p.k, p.k_stride, pages, p.num_k_heads, slots, p.head_dim},
          {"v", p.v, p.v_stride, pages, p.num_v_heads, slots, p.value_head_dim},
          {"out", p.out, p.out_stride, batch, p.num_heads, tokens, p.value_head_dim}};
}

int key_box_rows(const AttentionParams& params, int block_keys) {
  if (params.max_pages == 1) return block_keys;
  return static_cast<int>(std::gcd(params.page_size, int64_t{block_keys}));
}

int max_tiles(const AttentionParams& params) { return static_cast<int>(count_tiles(params)); }

bool has_score_mods(const AttentionParams& params) {
  return params.softcap != 0.0f || params.alibi_slopes != nullptr || params.attn_mask != nullptr ||
         !(params.scale > 0.0f);
}

int head_dim_class(const AttentionParams& params) {
  const int64_t dim = std::max(params.head_dim, params.value_head_dim);
  return dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
}

int tile_rows(const AttentionParams& params) {
  return head_dim_class(params) == 64 ? Config<64, 128>::kBlockM : Config<128, 128>::kBlockM;
}

Schedule make_schedule(const AttentionParams& params) {
  Schedule schedule{};
  const int rows = tile_rows(params);
  schedule.q_blocks = static_cast<int>((params.q_len + rows - 1) / rows);
  const int64_t sequences = params.q_offsets == nullptr ? params.batch : 1;
  schedule.units = static_cast<int>(sequences * params.num_heads);
  const int64_t head_bytes =
      std::max<int64_t>(1, params.kv_len * (params.head_dim + params.value_head_dim) * int64_t{2});
  const int64_t kv_heads = std::max<int64_t>(1, kSectionBytes / head_bytes);
  // The average number of query heads that read a KV head: the host does not know the groups'
  // shapes.
  const int64_t units = kv_heads * params.num_heads / std::max<int64_t>(1, params.num_k_heads);
  schedule.section = static_cast<int>(std::clamp<int64_t>(units, 1, schedule.units));
  schedule.last_block_first = params.window_right >= 0;
  return schedule;
}

bool draws_tiles(const AttentionParams& params, int num_sms) {
  const bool uneven = params.window_left >= 0 || params.window_right >= 0 ||
                      params.kv_lengths != nullptr || params.q_offsets != nullptr;
  return uneven && count_tiles(params) > num_sms;
}

std::string prefill_unsupported(const AttentionParams& params) {
  if (params.dtype != DType::kBFloat16 && params.dtype != DType::kFloat16) {
    return "dtype must be bfloat16 or float16";
  }
  if (params.k_dtype != params.dtype || params.v_dtype != params.dtype) {
    return "k and v must have q's dtype";
  }
  if (params.page_table != nullptr && params.max_pages != 1) {
    // Eight rows are the span of the swizzle: a box of fewer would not lie as the products need it.
    if (params.page_size < 8 || params.page_size % 8 != 0) {
      return with_value("page_size must be a multiple of 8", params.page_size);
    }
    if (params.kv_begin != nullptr) return "sequences of several pages must begin at their start";
  }
  if (params.attn_mask != nullptr && params.q_offsets != nullptr) {
    return "attn_mask must not be given with packed sequences";
  }
  if (params.dropout_threshold != 0) return "dropout_p must be 0";
  if (params.head_dim < 1 || params.head_dim > 256) {
    return with_value("D must be 1 to 256", params.head_dim);
  }
  if (params.value_head_dim < 1 || params.value_head_dim > 256) {
    return with_value("Dv must be 1 to 256", params.value_head_dim);
  }
  if (params.num_heads > kMaxHeads) {
    return with_value("Hq must be at most " + std::to_string(kMaxHeads), params.num_heads);
  }
  if (params.num_k_heads * params.num_v_heads > INT32_MAX) {
    return with_value("Hk * Hv must be below 2^31", params.num_k_heads * params.num_v_heads);
  }
  if (params.q_offsets != nullptr && params.q_tokens > kMaxLength) {
    return with_value("query tokens must be at most 2^29", params.q_tokens);
  }
  if (params.q_len > kMaxLength) return with_value("Sq must be at most 2^29", params.q_len);
  if (params.kv_len > kMaxLength) return with_value("Sk must be at most 2^29", params.kv_len);
  if (count_tiles(params) > INT32_MAX / 2) {
    return with_value("tiles of query tokens must number at most 2^30", count_tiles(params));
  }
  const PrefillViews views = prefill_views(params);
  for (const TensorView* tensor : {&views.q, &views.k, &views.v, &views.out}) {
    if (std::string reason = tensor_map_unsupported(*tensor); !reason.empty()) return reason;
  }
  return "";
}

bool prefill_supported(const AttentionParams& params) {
  return prefill_unsupported(params).empty();
}

size_t prefill_workspace_bytes(const AttentionParams& params, const Device& device) {
  return draws_tiles(params, device.num_sms) ? sizeof(int) : 0;
}

void prefill(const AttentionParams& params, void* workspace, const Device& device,
             cudaStream_t stream) {
  const int num_sms = device.num_sms;
  if (std::string reason = prefill_unsupported(params); !reason.empty()) {
    throw std::runtime_error("sm90 prefill: " + reason);
  }
  if (count_tiles(params) == 0 || is_empty(prefill_views(params).q)) return;
  const bool bf16 = params.dtype == DType::kBFloat16;
  switch (head_dim_class(params)) {
    case 64:
      return bf16 ? launch_prefill<BFloat16, 64>(params, workspace, num_sms, stream)
                  : launch_prefill<Float16, 64>(params, workspace, num_sms, stream);
    case 128:
      return bf16 ? launch_prefill<BFloat16, 128>(params, workspace, num_sms, stream)
                  : launch_prefill<Float16, 128>(params, workspace, num_sms, stream);
    default:
      return bf16 ? launch_prefill<BFloat16, 256>(params, workspace, num_sms, stream)
                  : launch_prefill<Float16, 256>(params, workspace, num_sms, stream);
  }
}

}  // namespace gqa::cuda::sm90
