// One (sequence, head) of K or V at a time, in the order of its keys: rows move to the front, so
// each is read before another is written over it. Rows are bytes here, whatever their format.
#define GQA_ISA keep

#include "keep.h"

#include <algorithm>
#include <cstring>

#include "../forward/kv_rows.h"
#include "../isa/vec_portable.h"

namespace gqa::cpu {
namespace keep {
namespace {

// Bytes below which waking another thread costs more than it saves (about 10 microseconds).
constexpr int64_t kMinBytesPerWorker = 128 * 1024;

struct Place {
  int64_t page, slot;
};

// K's or V's side of the cache.
struct Side {
  const KeptSide& memory;
  const Strides &stride, &scale_stride, &zero_stride;

  static int64_t offset(const Strides& stride, Place at, int64_t head) {
    return at.page * stride.b + head * stride.h + at.slot * stride.s;
  }

  void move(Place from, Place to, int64_t head) const {
    char* const data = static_cast<char*>(memory.data);
    std::memmove(data + offset(stride, to, head) * memory.element_bytes,
                 data + offset(stride, from, head) * memory.element_bytes, memory.row_bytes);
    move_number(memory.scale, scale_stride, from, to, head);
    move_number(memory.zero, zero_stride, from, to, head);
  }

 private:
  static void move_number(float* x, const Strides& stride, Place from, Place to, int64_t head) {
    if (x) x[offset(stride, to, head)] = x[offset(stride, from, head)];
  }
};

// Every worker takes an equal share of the (sequence, head)s of K and V.
struct Work {
  const KeepParams& params;
  int64_t workers;

  int64_t heads() const { return params.cache.num_k_heads + params.cache.num_v_heads; }

  void run_worker(int64_t worker) const {
    const int64_t items = params.cache.batch * heads();
    for (int64_t item = items * worker / workers; item < items * (worker + 1) / workers; ++item) {
      run_head(item / heads(), item % heads());
    }
  }

  void run_head(int64_t b, int64_t item) const {
    const AttentionParams& cache = params.cache;
    const bool is_key = item < cache.num_k_heads;
    const int64_t head = is_key ? item : item - cache.num_k_heads;
    // If value heads differ from key heads, all share one table row, length and list of indices.
    const bool paired = is_key || cache.num_v_heads == cache.num_k_heads;
    const int64_t k_head = paired ? head : 0;
    const Side side =
        is_key ? Side{params.k, cache.k_stride, cache.k_scale_stride, cache.k_zero_stride}
               : Side{params.v, cache.v_stride, cache.v_scale_stride, cache.v_zero_stride};
    const Pages pages(cache, b, k_head);
    const int64_t begin = cache.kv_begin == nullptr ? 0 : cache.kv_begin[b];
    const int64_t length = std::min<int64_t>(
        cache.kv_lengths[b * cache.kv_lengths_stride_b + k_head * cache.kv_lengths_stride_h],
        cache.kv_len - begin);
    const int64_t count = std::min<int64_t>(
        {params.counts[b * params.count_stride_b + k_head * params.count_stride_h],
         params.num_indices, length});
    const int32_t* index =
        params.indices + b * params.index_stride_b + k_head * params.index_stride_h;
    const auto place = [&](int64_t key) {
      Place found{-1, 0};
      pages.walk(key, 1, [&](int64_t page, int64_t slot, int, int) { found = {page, slot}; });
      return found;
    };
    for (int64_t i = 0; i < count; ++i) {
      const int64_t key = index[i * params.index_stride_n];
      if (key == i || key < 0 || key >= length) continue;
      const Place from = place(key), to = place(i);
      if (from.page >= 0 && to.page >= 0) side.move(from, to, head);
    }
  }
};

}  // namespace
}  // namespace keep

void cache_keep(const KeepParams& params, const ThreadPool& pool) {
  const AttentionParams& cache = params.cache;
  const int64_t rows = cache.batch * params.num_indices;
  const int64_t bytes =
      rows * (cache.num_k_heads * params.k.row_bytes + cache.num_v_heads * params.v.row_bytes);
  const int64_t wanted = bytes / keep::kMinBytesPerWorker;
  const int64_t workers = std::min<int64_t>(pool.num_threads, std::max<int64_t>(wanted, 1));
  keep::Work work{params, workers};
  run_workers(pool, workers, work);
}

}  // namespace gqa::cpu
