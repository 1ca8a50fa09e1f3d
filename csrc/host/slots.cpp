#include "slots.h"

#include <algorithm>

#include "call.h"

namespace gqa::host {
namespace {

// Reads an int32 tensor on the CPU through its strides.
class Values {
 public:
  Values(const char* name, const OptionalTensor& x, std::initializer_list<int64_t> shape) {
    if (!x) return;
    check_dtype(name, *x, ScalarType::Int);
    check_cpu(name, *x, *x);
    check_shape(name, *x, shape);
    data_ = static_cast<const int32_t*>(x->const_data_ptr());
    for (size_t i = 0; i < shape.size(); ++i) stride_[i] = x->stride(static_cast<int64_t>(i));
  }

  bool given() const { return data_ != nullptr; }
  bool same_for_heads() const { return stride_[1] == 0; }
  int64_t at(int64_t i, int64_t j = 0, int64_t k = 0) const {
    return data_[i * stride_[0] + j * stride_[1] + k * stride_[2]];
  }

 private:
  const int32_t* data_ = nullptr;
  int64_t stride_[3] = {0, 0, 0};
};

}  // namespace

bool cache_slots_exist_cpu(const Tensor& kv_lengths, const OptionalTensor& page_table,
                           const OptionalTensor& kv_begin, const OptionalTensor& new_offsets,
                           int64_t new_tokens, int64_t num_pages, int64_t page_size) {
  STD_TORCH_CHECK(kv_lengths.dim() == 2, "kv_lengths must have 2 dims, [B, Hk], got ",
                  kv_lengths.dim());
  STD_TORCH_CHECK(!page_table || page_table->dim() == 3,
                  "page_table must have 3 dims, [B, Hk, max_pages]");
  STD_TORCH_CHECK(page_size >= 1, "page_size must be at least 1, got ", page_size);
  const int64_t batch = kv_lengths.size(0), heads = kv_lengths.size(1);
  const int64_t max_pages = page_table ? page_table->size(2) : 1;
  const Values lengths("kv_lengths", OptionalTensor(kv_lengths), {batch, heads});
  const Values table("page_table", page_table, {batch, heads, max_pages});
  const Values begins("kv_begin", kv_begin, {batch});
  const Values offsets("new_offsets", new_offsets, {batch + 1});

  const bool alike = lengths.same_for_heads() && table.same_for_heads();
  const int64_t different_heads = alike ? std::min<int64_t>(heads, 1) : heads;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t begin = begins.given() ? begins.at(b) : 0;
    const int64_t added = offsets.given() ? offsets.at(b + 1) - offsets.at(b) : new_tokens;
    if (begin < 0 || added < 0) return false;
    for (int64_t h = 0; h < different_heads; ++h) {
      const int64_t length = lengths.at(b, h), end = begin + length + added;
      if (length < 0 || end > max_pages * page_size) return false;
      if (!table.given()) continue;
      for (int64_t page = begin / page_size; page * page_size < end; ++page) {
        const int64_t id = table.at(b, h, page);
        if (id < 0 || id >= num_pages) return false;
      }
    }
  }
  return true;
}

}  // namespace gqa::host
