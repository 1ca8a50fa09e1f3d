// Runs tasks: the online softmax over the keys of a task, tile after tile, for all its rows.
//
//   for every tile of keys:  S = Q K^T;  P = exp(S - max);  O = O * exp(old max - max) + P V
//   then:                    out = O / sum, or a partial result; the last split merges them
//
// In batch invariant calls, a task that has several segments of keys merges the result of each with
// those before, as the last split does with splits.
//
// Rows are query tokens x heads of one group, token-major: row r is token r / heads, head r %
// heads. Direct tasks (few rows, decode) read K and V in place: products_direct.h, products_fp8.h,
// products_int16.h, products_amx.h. The others pack K and V first: products_packed.h,
// products_pairs.h. Tasks of one bundle alternate after every tile of keys.
#pragma once

#include <cmath>
#include <cstdint>
#include <deque>
#include <vector>

#include "../../core/dropout.h"
#include "../../core/visible.h"
#include "../isa/cpu_features.h"
#include "../isa/isa.h"
#include "../isa/math.h"
#include "dequantize.h"
#include "kernel_table.h"
#include "key_scores.h"
#include "kv_rows.h"
#include "products_direct.h"
#include "products_fp8.h"
#include "products_int16.h"
#include "products_packed.h"
#include "row_keys.h"
#include "schedule.h"
#include "scratch.h"
#include "softmax.h"
#include "tile.h"

namespace gqa::cpu::GQA_ISA {

template <class S>
inline constexpr bool kInteger = std::is_same_v<S, Int8> || std::is_same_v<S, Int4Pair>;
template <class S>
inline constexpr bool kFloat8 = std::is_same_v<S, Float8E4M3> || std::is_same_v<S, Float8E5M2>;

// Calls `visit` with a null pointer whose type is the query's element type. If the cache is not
// quantised, that is S.
template <class S, class Visit>
GQA_INLINE auto with_query_type(const AttentionParams& params, Visit visit) {
  if constexpr (!kQuantized<S>) {
    return visit(static_cast<S*>(nullptr));
  } else {
    switch (params.dtype) {
      case DType::kBFloat16: return visit(static_cast<BFloat16*>(nullptr));
      case DType::kFloat16: return visit(static_cast<Float16*>(nullptr));
      default: return visit(static_cast<float*>(nullptr));
    }
  }
}

// The rows of K of the next tile, to be prefetched.
template <class S>
struct NextRows {
  const S* const* rows;
  int n;
};

// S, SV: types of K and V. They differ only if both are quantised.
template <class V, class S, class SV, class Products>
class AttentionTask {
 public:
  // own, shared: memory as TileLayout describes it. more: further arguments of Products.
  template <class... More>
  AttentionTask(const CallState& call, const Task& task, const TileLayout<V>& layout, float* own,
                float* shared, More... more)
      : call_(call),
        params_(call.params),
        task_(task),
        tile_(layout, own, shared),
        pages_(params_, task.batch, task.k_head),
        k_(KVRows<S>::k(params_, pages_, task.k_head)),
        v_(KVRows<SV>::v(params_, pages_, task.v_head)),
        dequantizer_(params_, pages_, task.k_head, task.v_head, tile_),
        products_(params_, tile_, more...),
        rows_(task.num_rows()),
        key_scores_(call.auxiliary.rows_of(&task - call.schedule.tasks.data()), rows_,
                    shared + call.scratch_floats) {
    for (int r = 0; r < rows_; ++r) {
      const int64_t t = task.token_begin + r / task.num_heads();
      const int32_t h = call.schedule.heads[task.head_begin + r % task.num_heads()];
      call_rows_[r] = {task.batch, h, t,
                       call.masks.visible(params_, task.kv_length, task.batch, h, t)};
    }
  }
  AttentionTask(const AttentionTask&) = delete;  // parts point to each other
  AttentionTask& operator=(const AttentionTask&) = delete;

  void begin() {
    with_query_type<S>(params_, [&](auto* type) {
      load_queries(type, round_up(rows_, Products::kBlocks.padding));
    });
    products_.begin(rows_);
    if (kQuantized<S>) dequantizer_.begin(rows_);
  }

  // Finds the rows of K of keys first to first + n - 1, and prefetches the scales of the tile.
  void prepare(int64_t first, int n, const S** k_rows) const {
    k_.fetch(first, n, k_rows);
    if (kQuantized<S>) dequantizer_.prefetch(first, n);
  }

  // Keys first to first + n - 1, at most a tile; k_rows: as prepared.
  void add_tile(int64_t first, int n, const S* const* k_rows, const NextRows<S>& next_rows) {
    constexpr RowBlocks kBlocks = Products::kBlocks;
    const SV* v_rows[kMaxTileKeys];
    StripKeys strips[(Products::kMaxRows + Products::kStrip - 1) / Products::kStrip];
    for (int r = 0; r < rows_; ++r) {
      runs_[r] = keys_in_tile(params_, call_.masks, call_rows_[r], first, n);
    }
    bool any = false;
    for (int r = 0; r < rows_; r += Products::kStrip) {
      StripKeys& strip = strips[r / Products::kStrip];
      strip = union_of(runs_, r, r + Products::kStrip < rows_ ? r + Products::kStrip : rows_);
      any |= strip.begin < strip.end;
    }
    key_scores_.begin_tile(first, n);
    if (!any) {  // a mask or key ranges hide the whole tile
      key_scores_.hide_all();
      return;
    }
    v_.fetch(first, n, v_rows);
    products_.begin_tile(k_rows, v_rows, n, next_rows.rows, next_rows.n);
    if (kQuantized<S>) dequantizer_.begin_tile(first, n);
    for (int begin = 0; begin < rows_; begin += kBlocks.rows) {
      const int block_end = rows_ - begin < kBlocks.rows ? rows_ : begin + kBlocks.rows;
      products_.scores(begin, block_end, strips);
      for (int r = begin; r < block_end; r += kSoftmaxRows) {
        const int n = block_end - r < kSoftmaxRows ? block_end - r : kSoftmaxRows;
        has_bias(r, n) ? softmax<true>(r, n, row_scores(r - begin), first, strips)
                       : softmax<false>(r, n, row_scores(r - begin), first, strips);
      }
      products_.accumulate(begin, block_end, strips);
    }
  }

  // After the last tile of a segment, unless it is the task's last tile.
  void end_segment() {
    add_to_total();
    for (int r = 0; r < rows_; ++r) {
      tile_.max[r] = -INFINITY;
      tile_.sum[r] = 0.0f;
      fill(tile_.o + r * tile_.layout.o_ld, 0.0f);
    }
  }

  void end() {
    if (has_total_) {
      add_to_total();
      for (int r = 0; r < rows_; ++r) {
        const int64_t at = r * tile_.layout.o_ld;
        tile_.max[r] = tile_.total_max[r];
        tile_.sum[r] = tile_.total_sum[r];
        for (int64_t d = 0; d < tile_.layout.o_ld; ++d) tile_.o[at + d] = tile_.total_o[at + d];
      }
    }
    products_.end(rows_);
    if (task_.merge < 0) {
      for (int r = 0; r < rows_; ++r)
        write_row(r, tile_.o + r * tile_.layout.o_ld, tile_.max[r], tile_.sum[r]);
      key_scores_.sum();
    } else {
      store_partial_result();
      // The last split to finish sees all others' results: acquire pairs with their release.
      if (call_.unfinished[task_.merge].fetch_sub(1, std::memory_order_acq_rel) == 1)
        merge_splits();
    }
  }

 private:
  // Rows that go through the softmax together. In tasks with many rows, more than one would evict
  // packed K and V from the first-level cache.
  static constexpr int kSoftmaxRows = Products::kMaxRows > kMaxDirectRows ? 1 : kMaxDirectRows;

  int64_t token(int r) const { return call_rows_[r].token; }
  int64_t head(int r) const { return call_rows_[r].head; }
  int64_t query(int r) const { return query_number(params_, task_.batch, token(r)); }
  // The token's index in q, out and lse.
  int64_t stored_token(int r) const { return token(r) + task_.token_offset; }
  int64_t stored_batch() const { return params_.q_offsets != nullptr ? 0 : task_.batch; }

  template <class T>
  void load_queries(const T*, int64_t padded_rows) {
    const TileLayout<V>& layout = tile_.layout;
    const T* q = static_cast<const T*>(params_.q) + stored_batch() * params_.q_stride.b;
    for (int r = 0; r < padded_rows; ++r) {
      float* to = tile_.q + r * layout.q_ld;
      const int64_t filled = r < rows_ ? params_.head_dim : 0;
      if (r < rows_) {
        const T* from = q + head(r) * params_.q_stride.h + stored_token(r) * params_.q_stride.s;
        widen_row<V>(from, params_.head_dim, to);
      }
      for (int64_t d = filled; d < layout.q_ld; ++d) to[d] = 0.0f;
      fill(tile_.o + r * layout.o_ld, 0.0f);
    }
    for (int r = 0; r < rows_; ++r) {
      tile_.max[r] = -INFINITY;
      tile_.sum[r] = 0.0f;
    }
    for (int64_t key = 0; key < layout.keys; ++key) tile_.keep[key] = 0.0f;
  }

  // Whether the scores of any of rows [r, r + n) change other than by scale and visibility.
  bool has_bias(int r, int n) const {
    if (params_.softcap != 0.0f || params_.alibi_slopes) return true;
    for (int i = r; i < r + n && params_.attn_mask; ++i) {
      if (runs_[i].changed) return true;
    }
    return false;
  }

  // The softmax of rows [r, r + n), whose scores are at s. Two loops let the processor overlap the
  // latencies of different rows.
  template <bool kBias>
  void softmax(int r, int n, float* s, int64_t first, const StripKeys* strips) {
    float block_max[kSoftmaxRows];
    for (int i = 0; i < n; ++i) {
      const StripKeys& strip = strips[(r + i) / Products::kStrip];
      float* scores = s + i * tile_.layout.keys;
      if (strip.begin >= strip.end) {
        if (key_scores_.counts(r + i)) key_scores_.hide(r + i);
        continue;
      }
      block_max[i] = finish_scores<kBias>(r + i, scores, first, strip);
      if (key_scores_.counts(r + i)) key_scores_.store(r + i, scores, strip);
    }
    for (int i = 0; i < n; ++i) {
      const StripKeys& strip = strips[(r + i) / Products::kStrip];
      if (strip.begin >= strip.end) continue;
      exponentiate(r + i, s + i * tile_.layout.keys, block_max[i], first, strip);
    }
  }

  float* row_scores(int r) const { return tile_.s + r * tile_.layout.keys; }

  RowKeys row_keys(int r, const StripKeys& strip) const {
    return {strip.begin, strip.end, runs_[r].begin, runs_[r].end};
  }

  template <bool kBias>
  float finish_scores(int r, float* s, int64_t first, const StripKeys& strip) {
    RowBias bias{};
    if (kBias) {
      bias.softcap = params_.softcap;
      bias.position =
          static_cast<float>(query_position(params_, task_.kv_length, token(r)) - first);
      if (params_.alibi_slopes) {
        bias.slope = kScoreUnit<S> * params_.alibi_slopes[task_.batch * params_.alibi_stride_b +
                                                          head(r) * params_.alibi_stride_h];
      }
      if (runs_[r].changed) {
        bias.additive = mask_row<V>(params_, task_.batch, head(r), query(r), first, strip.begin,
                                    strip.end, tile_.bias);
      }
    }
    return finish_row_scores<V, S, kBias, kQuantized<S>>(
        s, row_keys(r, strip), params_.scale * products_.score_step(r), bias, row_scales(r));
  }

  void exponentiate(int r, float* s, float block_max, int64_t first, const StripKeys& strip) {
    const RowKeys keys = row_keys(r, strip);
    const float* keep = nullptr;
    if (params_.dropout_threshold != 0) {
      dropout_row(params_, task_.batch, head(r), query(r), first, keys.visible_begin,
                  keys.visible_end, tile_.keep);
      keep = tile_.keep;
    }
    float most = 0.0f;
    const float rescale = exponentiate_row<V, S, kQuantized<S>, typename Products::Probability>(
        s, keys, block_max, row_scales(r), keep, tile_.max[r], tile_.sum[r], most);
    if (rescale != 1.0f) scale_row(tile_.o + r * tile_.layout.o_ld, rescale);
    if (kQuantized<S>) dequantizer_.subtract_zeros(r, strip);
    if constexpr (Products::kRoundsProbabilities) products_.round_probabilities(r, strip, most);
  }

  RowScales row_scales(int r) const {
    return kQuantized<S> ? dequantizer_.row_scales(r) : RowScales{};
  }

  void scale_row(float* o, float factor) {
    for (int64_t d = 0; d < tile_.layout.o_ld; d += V::kWidth) {
      V::store(o + d, V::mul(V::load(o + d), V::set1(factor)));
    }
  }

  // Row r of this task's split: [max, sum, o[Dv]]
  float* partial_row(int split, int r) const {
    return call_.partials + task_.partial +
           (static_cast<int64_t>(split) * rows_ + r) * partial_row_floats(params_);
  }

  void store_partial_result() {
    for (int r = 0; r < rows_; ++r) {
      float* row = partial_row(task_.split, r);
      row[0] = tile_.max[r];
      row[1] = tile_.sum[r];
      widen_row<V>(tile_.o + r * tile_.layout.o_ld, params_.value_head_dim, row + 2);
    }
  }

  // Merges in the order of the splits, so that results do not depend on the threads' timing.
  void merge_splits() {
    for (int r = 0; r < rows_; ++r) {
      float max = -INFINITY, sum = 0.0f;
      float* o = tile_.o + r * tile_.layout.o_ld;
      fill(o, 0.0f);
      for (int i = 0; i < task_.num_splits; ++i) {
        const float* row = partial_row(i, r);
        merge(row[0], row[1], row + 2, params_.value_head_dim, max, sum, o);
      }
      write_row(r, o, max, sum);
    }
    key_scores_.sum();
  }

  // Adds the result of one segment to that of those before.
  void add_to_total() {
    for (int r = 0; r < rows_; ++r) {
      float* total = tile_.total_o + r * tile_.layout.o_ld;
      if (!has_total_) {
        tile_.total_max[r] = -INFINITY;
        tile_.total_sum[r] = 0.0f;
        fill(total, 0.0f);
      }
      merge(tile_.max[r], tile_.sum[r], tile_.o + r * tile_.layout.o_ld, tile_.layout.o_ld,
            tile_.total_max[r], tile_.total_sum[r], total);
    }
    has_total_ = true;
  }

  // Adds a row's result over some keys to its result over keys before them. Exact if either has
  // none.
  static void merge(float max, float sum, const float* o, int64_t dims, float& total_max,
                    float& total_sum, float* total) {
    const float most = max > total_max ? max : total_max;
    const auto factor_of = [most](float x) {
      return x == most ? 1.0f : exp_score_scalar<V, S>(x - most);
    };
    const float old_factor = factor_of(total_max), factor = factor_of(max);
    total_max = most;
    total_sum = total_sum * old_factor + sum * factor;
    for (int64_t d = 0; d < dims; ++d) total[d] = total[d] * old_factor + o[d] * factor;
  }

  void fill(float* o, float value) const {
    for (int64_t d = 0; d < tile_.layout.o_ld; ++d) o[d] = value;
  }

  void write_row(int r, const float* o, float max, float sum) {
    with_query_type<S>(params_, [&](auto* type) { write_row(type, r, o, max, sum); });
  }

  // out = o / sum and LSE = ln(sum) + max, with the head's sink in the sum.
  template <class T>
  void write_row(const T*, int r, const float* o, float max, float sum) {
    const int64_t h = head(r), b = stored_batch(), t = stored_token(r);
    const bool sees_nothing =
        sum == 0.0f;  // a visible key adds about 1 at the maximum; NaN is not 0
    const float score_max = max;
    float factor = 1.0f;
    if (params_.sinks && !sees_nothing) {
      const float sink = params_.sinks[h] * kScoreUnit<S>;
      const float new_max = sink > max ? sink : max;
      factor = exp_score_scalar<V, S>(max - new_max);
      sum = sum * factor + exp_score_scalar<V, S>(sink - new_max);
      max = new_max;
    }
    // In double, because an error of the LSE is a relative error of the backward's P. `max` carries
    // the rounding of kScoreUnit, and so must the factor.
    constexpr double kNatural = 1.0 / static_cast<double>(kScoreUnit<S>);
    const int64_t row = (b * params_.num_heads + h) * params_.q_tokens + t;
    params_.lse[row] =
        sees_nothing ? -INFINITY
                     : static_cast<float>(max * kNatural + std::log(static_cast<double>(sum)));
    const float probability = sees_nothing ? 0.0f : factor / sum;  // of a key at the maximum
    const typename V::F inverse = V::set1(probability);
    if (call_.auxiliary.row_max() != nullptr) {
      call_.auxiliary.row_max()[row] = static_cast<float>(score_max * kNatural);
    }
    if (key_scores_.counts(r)) key_scores_.end_row(r, score_max, probability);
    T* out = static_cast<T*>(params_.out) + b * params_.out_stride.b + h * params_.out_stride.h +
             t * params_.out_stride.s;
    const int64_t dims = params_.value_head_dim;
    int64_t d = 0;
    for (; d + V::kWidth <= dims; d += V::kWidth)
      V::store(out + d, V::mul(V::load(o + d), inverse));
    if (d < dims) store_partial<V>(out + d, V::mul(V::load(o + d), inverse), dims - d);
  }

  const CallState& call_;
  const AttentionParams& params_;
  const Task& task_;
  Tile<V> tile_;
  Pages pages_;
  KVRows<S> k_;
  KVRows<SV> v_;
  Dequantizer<V, S, SV> dequantizer_;
  Products products_;
  int rows_;
  KeyScores<V, S, Products::kMaxRows> key_scores_;
  bool has_total_ = false;  // whether total_o holds segments
  CallRow call_rows_[Products::kMaxRows];
  MaskRun runs_[Products::kMaxRows];  // of this tile
};

// Runs the tasks of one bundle, which have the same keys: all tasks on the first tile, then all on
// the next.
template <class S, class Running>
void run_interleaved(Running* const* tasks, int count, int64_t key_begin, int64_t key_end,
                     const TileShape& tile) {
  const int tile_keys = tile.keys;
  const S* k_rows[2][kMaxTileKeys];  // of this step and the next
  const auto keys_of_tile = [&](int64_t first) {
    const int64_t n = first < key_end ? key_end - first : 0;
    return static_cast<int>(n < tile_keys ? n : tile_keys);
  };
  for (int i = 0; i < count; ++i) tasks[i]->begin();
  tasks[0]->prepare(key_begin, keys_of_tile(key_begin), k_rows[0]);
  int which = 0;
  for (int64_t first = key_begin; first < key_end; first += tile_keys) {
    const int n = keys_of_tile(first);
    if (tile.segment_keys > 0 && first > key_begin && first % tile.segment_keys == 0) {
      for (int i = 0; i < count; ++i) tasks[i]->end_segment();
    }
    for (int i = 0; i < count; ++i, which ^= 1) {
      const bool last = i + 1 == count;
      const int64_t next = last ? first + n : first;
      const NextRows<S> next_rows{k_rows[which ^ 1], keys_of_tile(next)};
      tasks[last ? 0 : i + 1]->prepare(next, next_rows.n, k_rows[which ^ 1]);
      tasks[i]->add_tile(first, n, k_rows[which], next_rows);
    }
  }
  for (int i = 0; i < count; ++i) tasks[i]->end();
}

template <class V, class S, class SV, class Products, class... More>
void run_with(const CallState& call, const Bundle& bundle, const RowBlocks& blocks, float* scratch,
              More... more) {
  using Running = AttentionTask<V, S, SV, Products>;
  const TileShape& tile = call.schedule.tile;
  const Task* tasks = call.schedule.tasks.data() + bundle.first;
  const auto layout = [&](int i) {
    return TileLayout<V>(call.params, tile, blocks, tasks[i].num_rows());
  };
  const int64_t begin = tasks[0].key_begin, end = tasks[0].key_end;
  float* own = scratch + layout(0).shared_floats();
  if (bundle.count == 1) {  // needs no allocation
    Running task(call, tasks[0], layout(0), own, scratch, more...);
    Running* only = &task;
    return run_interleaved<S>(&only, 1, begin, end, tile);
  }
  std::deque<Running> running;  // a deque never moves its elements
  std::vector<Running*> places;
  for (int i = 0; i < bundle.count; ++i) {
    places.push_back(&running.emplace_back(call, tasks[i], layout(i), own, scratch, more...));
    own += layout(i).own_floats();
  }
  run_interleaved<S>(places.data(), bundle.count, begin, end, tile);
}

// Runs the tasks of one bundle, with K in type S and V in type SV. Few, Many: the products of direct
// and of other tasks. Direct tasks over fp8, int8 and int4 have products of their own if the
// processor and the type of the queries allow them.
template <class V, class S, class SV = S, class Few = DirectProducts<V, S, SV>,
          class Many = PackedProducts<V, S, SV>>
void run_bundle(const CallState& call, const Bundle& bundle, float* scratch) {
  constexpr RowBlocks kBlocks = Many::kBlocks;
  if (!call.schedule.tasks[bundle.first].direct) {
    run_with<V, S, SV, Many>(call, bundle, kBlocks, scratch);
  } else if constexpr (V::kShiftsFp8 && kFloat8<S>) {
    cheap_subnormals() ? run_with<V, BitShiftedFp8<S>, BitShiftedFp8<S>, Fp8Products<V, S>>(
                             call, bundle, kBlocks, scratch)
                       : run_with<V, S, SV, Few>(call, bundle, kBlocks, scratch);
  } else if (!uses_int16_products<V>(call.params, call.schedule.tile)) {
    run_with<V, S, SV, Few>(call, bundle, kBlocks, scratch);
  } else if constexpr (V::kHasInt16 && kInteger<S>) {
    run_with<V, S, SV, Int16Products<V, S, SV>>(call, bundle, kBlocks, scratch, call.lse_wanted);
  }
}

}  // namespace gqa::cpu::GQA_ISA
