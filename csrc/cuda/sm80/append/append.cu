// Host side of the append, and the instances of its kernel: one for each type of the new tokens,
// stored as they are or quantised.
#include <algorithm>
#include <initializer_list>

#include "../../launch.h"
#include "kernel.cuh"
#include "launch.h"

namespace gqa::cuda::sm80 {
namespace {

constexpr int64_t kMaxDim = 32 * kAppendNumbers;  // a row is at most a warp

int64_t bits_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return 32;
    case DType::kBFloat16:
    case DType::kFloat16: return 16;
    case DType::kInt4: return 4;
    default: return 8;
  }
}

bool plain(DType dtype) { return bits_of(dtype) >= 16; }

// The number of new tokens, packed or not.
int64_t all_tokens(const AppendParams& p) {
  return p.new_offsets ? p.num_tokens : p.num_tokens * p.cache.batch;
}

int64_t heads_of_token(const AppendParams& p) {
  return p.cache.num_k_heads + p.cache.num_v_heads + (p.q ? p.cache.num_heads : 0);
}

struct Extents {
  int64_t b, h, s;
};

// Whether a thread's numbers form vectors of at most 16 bytes in every row. A dim with one index
// needs no stride.
bool in_vectors(const void* data, const Strides& stride, const Extents& extents, DType dtype) {
  const int64_t bits = bits_of(dtype);
  const int64_t bytes = std::min<int64_t>(kAppendNumbers * bits / 8, 16);
  const int64_t element = std::max<int64_t>(bits / 8, 1);  // of storage
  const auto aligned = [&](int64_t stride, int64_t extent) {
    return extent <= 1 || stride * element % bytes == 0;
  };
  return reinterpret_cast<uintptr_t>(data) % bytes == 0 && aligned(stride.b, extents.b) &&
         aligned(stride.h, extents.h) && aligned(stride.s, extents.s);
}

// The rows of a table are chunks of a thread's numbers, which none straddles.
bool table_in_vectors(const AppendParams& p, const void* table, int64_t stride, DType dtype) {
  return p.rotary_dim / 2 % kAppendNumbers == 0 &&
         in_vectors(table, {0, 0, stride}, {1, 1, p.rotary_positions}, dtype);
}

AppendArgs append_args(const AppendParams& p) {
  const AttentionParams& c = p.cache;
  const int64_t pages = c.page_table ? c.num_pages : c.batch;
  const int64_t batch = p.new_offsets ? 1 : c.batch;
  AppendArgs args{};
  args.params = p;
  const auto set = [&](AppendKind kind, const void* from, const Strides& from_stride, void* to,
                       const Strides& to_stride, int64_t heads, int64_t dim) -> AppendSide& {
    AppendSide& side = args.sides[kind];
    const Extents source{batch, heads, p.num_tokens};
    const bool stored = kind != kQueries;
    side.from = from;
    side.to = to;
    side.from_stride = from_stride;
    side.to_stride = to_stride;
    side.dim = static_cast<uint32_t>(dim);
    side.from_vectors = in_vectors(from, from_stride, source, p.dtype);
    side.to_vectors =
        in_vectors(to, to_stride, stored ? Extents{pages, heads, c.page_size} : source,
                   stored ? c.k_dtype : p.dtype);
    side.turned = kind != kValues && p.rotary_cos != nullptr;
    return side;
  };
  AppendSide& k = set(kKeys, p.k_new, p.k_new_stride, p.k, c.k_stride, c.num_k_heads, c.head_dim);
  k.scale = p.k_scale, k.zero = p.k_zero, k.dynamic = p.k_dynamic;
  k.scale_stride = c.k_scale_stride, k.zero_stride = c.k_zero_stride;
  AppendSide& v =
      set(kValues, p.v_new, p.v_new_stride, p.v, c.v_stride, c.num_v_heads, c.value_head_dim);
  v.scale = p.v_scale, v.zero = p.v_zero, v.dynamic = p.v_dynamic;
  v.scale_stride = c.v_scale_stride, v.zero_stride = c.v_zero_stride;
  if (p.q) {
    set(kQueries, p.q, p.q_stride, p.q_rotated, p.q_rotated_stride, c.num_heads, c.head_dim);
  }
  args.heads = static_cast<uint32_t>(heads_of_token(p));
  args.rows = static_cast<uint32_t>(all_tokens(p)) * args.heads;
  const int64_t dim = std::max(c.head_dim, c.value_head_dim);
  for (args.lanes = 1; args.lanes * kAppendNumbers < dim;) args.lanes *= 2;
  args.angle_vectors = p.rotary_cos &&
                       table_in_vectors(p, p.rotary_cos, p.cos_stride, p.cos_dtype) &&
                       table_in_vectors(p, p.rotary_sin, p.sin_stride, p.sin_dtype);
  return args;
}

template <class T>
void launch(const AppendArgs& args, cudaStream_t stream) {
  const auto kernel =
      plain(args.params.cache.k_dtype) ? append_kernel<T, false> : append_kernel<T, true>;
  const uint32_t rows_per_cta = kAppendThreads / args.lanes;
  launch_kernel("sm80 append", kernel, dim3((args.rows - 1) / rows_per_cta + 1), kAppendThreads, 0,
                stream, args);
}

}  // namespace

std::string append_unsupported(const AppendParams& p) {
  const AttentionParams& c = p.cache;
  const auto is = [](const char* name, int64_t value, const char* rule) {
    return std::string(name) + " must be " + rule + ", got " + std::to_string(value);
  };
  if (plain(c.k_dtype) ? c.k_dtype != p.dtype : !plain(p.dtype)) {
    return "k and v must have the new tokens' dtype or a quantised one";
  }
  if (c.v_dtype != c.k_dtype) return "k and v must have the same dtype";
  for (const auto& [name, dim] : {std::pair{"D", c.head_dim}, {"Dv", c.value_head_dim}}) {
    if (dim < 1 || dim > kMaxDim) return is(name, dim, "1 to 256");
  }
  if (c.num_k_heads < 1) return is("Hk", c.num_k_heads, "at least 1");
  if (c.kv_len > INT32_MAX) return is("Sk", c.kv_len, "below 2^31");
  if (c.batch > INT32_MAX) return is("B", c.batch, "below 2^31");
  const int64_t rows = all_tokens(p) * heads_of_token(p);
  if (rows > INT32_MAX) return is("the number of new rows", rows, "below 2^31");
  return "";
}

bool append_supported(const AppendParams& params) { return append_unsupported(params).empty(); }

size_t append_workspace_bytes(const AppendParams&, const Device&) { return 0; }

void append(const AppendParams& params, void*, const Device&, cudaStream_t stream) {
  const std::string reason = append_unsupported(params);
  if (!reason.empty()) throw std::runtime_error("sm80 append: " + reason);
  if (all_tokens(params) == 0) return;
  const AppendArgs args = append_args(params);
  switch (params.dtype) {
    case DType::kBFloat16: return launch<BFloat16>(args, stream);
    case DType::kFloat16: return launch<Float16>(args, stream);
    default: return launch<float>(args, stream);
  }
}

}  // namespace gqa::cuda::sm80
