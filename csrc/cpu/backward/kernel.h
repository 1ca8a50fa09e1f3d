// Runs one backward task: each of its blocks of rows with the keys that it sees, tile after tile.
//
//   for every block of rows, for every tile of keys:
//     S = Q K^T;  dP = dO V^T;  P, dS = backward_row(S, dP)
//     dV += P^T dO;  dK += dS^T Q;  dQ += dS K
//   then, when the parts of the KV head are added up (sums.h), dK and dV of all its keys
//
// All five products go through the packed micro-kernel of the forward (products_packed.h), except
// that the scores of few fp32 rows are the forward's direct ones (products_direct.h). dQ of a block
// stays in the caches; dK and dV of all keys are summed in fp32 in memory that is the task's
// own.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../../core/dropout.h"
#include "../../core/visible.h"
#include "../forward/kv_rows.h"
#include "../forward/products_direct.h"
#include "../forward/products_packed.h"
#include "../forward/row_keys.h"
#include "../isa/isa.h"
#include "../isa/math.h"
#include "kernel_table.h"
#include "softmax.h"
#include "tile.h"

namespace gqa::cpu::GQA_ISA {

template <class V>
SumWidths backward_sum_widths(const AttentionParams& params) {
  const BackwardLayout<V> layout(params, TileShape{0, 0});
  return {layout.dk_ld, layout.dv_ld};
}

// out[c][r] = in[r][c] for whole vectors of both; rows of `ld_in` and `ld_out`.
template <class V>
inline void transpose_tile(const float* in, int64_t ld_in, int64_t rows, int64_t columns,
                           float* out, int64_t ld_out) {
  constexpr int kW = V::kWidth;
  for (int64_t r = 0; r < rows; r += kW) {
    for (int64_t c = 0; c < columns; c += kW) {
      typename V::F x[kW];
      GQA_UNROLL(16)
      for (int i = 0; i < kW; ++i) x[i] = V::load(in + (r + i) * ld_in + c);
      V::transpose(x);
      GQA_UNROLL(16)
      for (int i = 0; i < kW; ++i) V::store(out + (c + i) * ld_out + r, x[i]);
    }
  }
}

// to[i] = factor * from[i]
template <class V, class T>
inline void store_scaled(const float* from, int64_t n, float factor, T* to) {
  const typename V::F scale = V::set1(factor);
  int64_t d = 0;
  for (; d + V::kWidth <= n; d += V::kWidth) V::store(to + d, V::mul(V::load(from + d), scale));
  if (d < n) store_partial<V>(to + d, V::mul(V::load(from + d), scale), n - d);
}

template <class V, class T>
class BackwardRun {
 public:
  BackwardRun(const BackwardState& state, const BackwardTask& task, float* scratch, float* sums)
      : state_(state),
        params_(state.params),
        call_(state.params.call),
        task_(task),
        tile_(BackwardLayout<V>(state.params.call, state.schedule.tile), scratch),
        widths_(SumWidths{tile_.layout.dk_ld, tile_.layout.dv_ld}),
        dk_(sums),
        dv_(sums + sum_keys(task) * widths_.of(task).dk) {}

  void run() {
    for (int64_t i = 0; i < sum_floats(task_, widths_); ++i) dk_[i] = 0.0f;
    for (int32_t i = task_.block_begin; i < task_.block_end; ++i) {
      block_ = &state_.schedule.blocks[i];
      rows_ = block_->num_rows();
      load_rows();
      run_tiles();
      if (wants_keys()) store_rows();
    }
  }

 private:
  static constexpr int kW = V::kWidth;
  static constexpr int kPanel = TileLayout<V>::kPanel;

  bool wants_keys() const { return task_.k_head >= 0; }
  bool wants_values() const { return task_.v_head >= 0; }
  int64_t token(int r) const { return block_->token_begin + r / block_->num_heads(); }
  int32_t head(int r) const {
    return state_.schedule.heads[block_->head_begin + r % block_->num_heads()];
  }
  int64_t row_index(int r) const {  // in [B, Hq, Sq]
    return (block_->batch * call_.num_heads + head(r)) * call_.q_len + token(r);
  }

  // Q and dO of the block, both by rows and packed; LSE.
  void load_rows() {
    const BackwardLayout<V>& l = tile_.layout;
    const T* q_rows[kMaxBackwardRows];
    const T* dout_rows[kMaxBackwardRows];
    const T* out_rows[kMaxBackwardRows];
    const T* q = static_cast<const T*>(call_.q) + block_->batch * call_.q_stride.b;
    const T* dout = static_cast<const T*>(params_.dout) + block_->batch * params_.dout_stride.b;
    const T* out = static_cast<const T*>(call_.out) + block_->batch * call_.out_stride.b;
    for (int r = 0; r < rows_; ++r) {
      q_rows[r] = q + head(r) * call_.q_stride.h + token(r) * call_.q_stride.s;
      dout_rows[r] = dout + head(r) * params_.dout_stride.h + token(r) * params_.dout_stride.s;
      widen_row<V>(q_rows[r], call_.head_dim, tile_.q + r * l.q_ld);
      for (int64_t d = call_.head_dim; d < l.q_ld; ++d) tile_.q[r * l.q_ld + d] = 0.0f;
      widen_row<V>(dout_rows[r], call_.value_head_dim, tile_.dout + r * l.o_ld);
      const float lse = call_.lse[row_index(r)];
      tile_.lse[r] = lse == -INFINITY ? INFINITY : lse * kScoreUnit<T>;
      out_rows[r] = out + head(r) * call_.out_stride.h + token(r) * call_.out_stride.s;
      call_rows_[r] = {
          block_->batch, head(r), token(r),
          state_.masks.visible(call_, block_->kv_length, block_->batch, head(r), token(r))};
      sums_[r] = RowSums{};
    }
    load_delta(dout_rows, out_rows);
    for (int64_t r = rows_; r < round_up(rows_, kStripRows); ++r) {
      for (int64_t d = 0; d < l.q_ld; ++d) tile_.q[r * l.q_ld + d] = 0.0f;
      for (int64_t d = 0; d < l.o_ld; ++d) tile_.dout[r * l.o_ld + d] = 0.0f;
    }
    for (int64_t i = 0; i < round_up(rows_, kStripRows) * l.dk_ld; ++i) tile_.dq[i] = 0.0f;
    for (int64_t key = 0; key < l.keys; ++key) tile_.keep[key] = 0.0f;
    if (wants_keys()) pack_rows<V>(q_rows, rows_, call_.head_dim, l.rows, tile_.q_panels);
    if (wants_values()) {
      pack_rows<V>(dout_rows, rows_, call_.value_head_dim, l.rows, tile_.dout_panels);
    }
  }

  // delta = rowsum(dout * out) - dlse. It is summed over the value head dim in the order of dP, so
  // that the score of a row that sees one key has a gradient of exactly 0.
  void load_delta(const T* const* dout_rows, const T* const* out_rows) {
    const int64_t dims = call_.value_head_dim;
    for (int first = 0; first < rows_; first += kW) {
      const int n = rows_ - first < kW ? rows_ - first : kW;
      typename V::F total = V::set1(0.0f), sum = V::set1(0.0f);
      for (int64_t d = 0; d < dims; d += kW) {
        if (d % kDotDims == 0) {
          total = V::add(total, sum);
          sum = V::set1(0.0f);
        }
        const int64_t width = dims - d < kW ? dims - d : kW;
        typename V::F x[kW], y[kW];
        for (int i = 0; i < kW; ++i) {
          const int r = first + (i < n ? i : 0);
          const bool whole = width == kW;
          x[i] = whole ? V::load(dout_rows[r] + d) : load_partial<V>(dout_rows[r] + d, width);
          y[i] = whole ? V::load(out_rows[r] + d) : load_partial<V>(out_rows[r] + d, width);
        }
        V::transpose(x);
        V::transpose(y);
        for (int64_t i = 0; i < width; ++i) sum = V::fma(x[i], y[i], sum);
      }
      store_partial<V>(tile_.delta + first, V::add(total, sum), n);
    }
    for (int r = 0; r < rows_; ++r) {
      if (tile_.lse[r] == INFINITY) tile_.delta[r] = 0.0f;  // the row sees no key
      if (params_.dlse && tile_.lse[r] != INFINITY) tile_.delta[r] -= params_.dlse[row_index(r)];
    }
  }

  void run_tiles() {
    const bool bias = call_.softcap != 0.0f || call_.alibi_slopes;
    const BackwardLayout<V>& l = tile_.layout;
    const Pages pages(call_, block_->batch, block_->k_head);
    const KVRows<T> k = KVRows<T>::k(call_, pages, block_->k_head);
    const KVRows<T> v = KVRows<T>::v(call_, pages, block_->v_head);
    const T* k_rows[kMaxBackwardKeys];
    const T* v_rows[kMaxBackwardKeys];
    StripKeys strips[kMaxBackwardRows / kStripRows];
    const int step = state_.schedule.tile.keys;
    // Tiles start at whole strips of the task's sums.
    const int64_t offset = (block_->key_begin - task_.key_begin) / kStripRows * kStripRows;
    for (int64_t first = task_.key_begin + offset; first < block_->key_end; first += step) {
      const int n =
          static_cast<int>(block_->key_end - first < step ? block_->key_end - first : step);
      for (int r = 0; r < rows_; ++r) {
        runs_[r] = keys_in_tile(call_, state_.masks, call_rows_[r], first, n);
      }
      for (int r = 0; r < rows_; r += kStripRows) {
        strips[r / kStripRows] =
            union_of(runs_, r, r + kStripRows < rows_ ? r + kStripRows : rows_);
      }
      const StripKeys all = union_of(runs_, 0, rows_);
      if (all.begin >= all.end) continue;  // a mask hides the whole tile
      k.fetch(first, n, k_rows);
      query_scores(k_rows, n, all, strips);
      if (wants_keys()) {
        v.fetch(first, n, v_rows);
        pack_transposed<V>(v_rows, n, call_.value_head_dim, tile_.v_columns);
        pack_rows<V>(k_rows, n, call_.head_dim, l.keys, tile_.k_panels);
        scores(tile_.dout, l.o_ld, tile_.v_columns, call_.value_head_dim, n, strips, tile_.ds);
      }
      for (int r = 0; r < rows_; ++r) {
        const StripKeys& strip = strips[r / kStripRows];
        bias || runs_[r].changed ? softmax<true>(r, first, n, strip)
                                 : softmax<false>(r, first, n, strip);
      }
      const int64_t key = first - task_.key_begin;
      if (wants_values()) {
        add_transposed(tile_.p, n, strips, tile_.dout_panels, l.dv_ld, dv_ + key * l.dv_ld);
      }
      if (wants_keys()) {
        add_transposed(tile_.ds, n, strips, tile_.q_panels, l.dk_ld, dk_ + key * l.dk_ld);
        add_dq(strips);
      }
    }
  }

  // S of the keys that each strip sees, and of `all` that the block sees, summed in the forward's order. The LSE and the output come
  // from exactly those sums: with others, rows of P = exp(S - LSE) would not add up to 1 if scores
  // are large. With 16-bit inputs the rounding of P hides the difference.
  void query_scores(const T* const* k_rows, int n, const StripKeys& all,
                    const StripKeys* strips) const {
    const BackwardLayout<V>& l = tile_.layout;
    if constexpr (std::is_same_v<T, float>) {
      if (block_->direct) {
        return direct_scores<V>(tile_.q, l.q_ld, rows_, k_rows, all, call_.head_dim, tile_.p,
                                l.keys);
      }
    }
    pack_transposed<V>(k_rows, n, call_.head_dim, tile_.k_columns);
    scores(tile_.q, l.q_ld, tile_.k_columns, call_.head_dim, n, strips, tile_.p);
  }

  // s[rows, keys] = a * columns, for the keys each strip sees
  void scores(const float* a, int64_t lda, const float* columns, int64_t depth, int n,
              const StripKeys* strips, float* s) const {
    const int64_t lds = tile_.layout.keys;
    for (int key = 0; key < n; key += kPanel) {
      for (int r = 0; r < rows_; r += kStripRows) {
        const StripKeys& need = strips[r / kStripRows];
        if (key + kPanel <= need.begin || key >= need.end) continue;
        dot_strip<V>(a + r * lda, lda, columns + key * depth, depth, s + r * lds + key, lds);
      }
    }
  }

  template <bool kBias>
  void softmax(int r, int64_t first, int n, const StripKeys& strip) {
    float* p = tile_.p + r * tile_.layout.keys;
    float* ds = tile_.ds + r * tile_.layout.keys;
    const int end = static_cast<int>(round_up(n, kPanel));
    if (strip.begin >= strip.end || tile_.lse[r] == INFINITY) {
      zero(p, 0, end);
      zero(ds, 0, end);
      return;
    }
    const RowKeys keys{strip.begin, strip.end, runs_[r].begin, runs_[r].end};
    RowBias bias{};
    if (kBias) {
      bias.softcap = call_.softcap;
      bias.position =
          static_cast<float>(query_position(call_, block_->kv_length, token(r)) - first);
      if (call_.alibi_slopes) {
        bias.slope = kScoreUnit<T> * call_.alibi_slopes[block_->batch * call_.alibi_stride_b +
                                                        head(r) * call_.alibi_stride_h];
      }
      if (runs_[r].changed) {
        bias.additive = mask_row<V>(call_, block_->batch, head(r), token(r), first, strip.begin,
                                    strip.end, tile_.bias);
      }
    }
    const float rest = std::fma(call_.lse[row_index(r)], kScoreUnit<T>, -tile_.lse[r]);
    BackwardRow row{tile_.lse[r], rest, tile_.delta[r], nullptr};
    if (call_.dropout_threshold != 0) {
      dropout_row(call_, state_.first_sequence + block_->batch, head(r), token(r), first,
                  keys.visible_begin, keys.visible_end, tile_.keep);
      row.keep = tile_.keep;
    }
    backward_row<V, T, kBias>(p, ds, keys, call_.scale, bias, row,
                              state_.slope_rows || state_.sink_rows ? &sums_[r] : nullptr);
    for (float* x : {p, ds}) {
      zero(x, 0, strip.begin / kW * kW);
      zero(x, static_cast<int>(round_up(strip.end, kW)), end);
    }
  }

  static void zero(float* x, int begin, int end) {
    for (int i = begin; i < end; i += kW) V::store(x + i, V::set1(0.0f));
  }

  // sums[keys, ld] += s^T * panels. For each strip of keys, rows that see none of them are skipped.
  void add_transposed(const float* s, int n, const StripKeys* strips, const float* panels,
                      int64_t ld, float* sums) {
    const BackwardLayout<V>& l = tile_.layout;
    transpose_tile<V>(s, l.keys, round_up(rows_, kW), round_up(n, kW), tile_.transposed, l.row_ld);
    // Keys that only fill up the last strip may belong to another block, so they get zeros.
    for (int64_t key = round_up(n, kW); key < round_up(n, kStripRows); ++key) {
      zero(tile_.transposed + key * l.row_ld, 0, static_cast<int>(l.row_ld));
    }
    const int num_strips = (rows_ + kStripRows - 1) / kStripRows;
    for (int key = 0; key < n; key += kStripRows) {
      int low = 0, high = num_strips;
      const auto sees = [&](int i) {
        return strips[i].begin < key + kStripRows && strips[i].end > key &&
               strips[i].begin < strips[i].end;
      };
      while (low < high && !sees(low)) ++low;
      while (low < high && !sees(high - 1)) --high;
      if (low == high) continue;
      const int begin = low * kStripRows;
      const int end = high * kStripRows < rows_ ? high * kStripRows : rows_;
      for (int64_t column = 0; column < ld; column += kPanel) {
        multiply_strip<V, Sums::kContinue>(tile_.transposed + key * l.row_ld + begin, l.row_ld,
                                           panels + column * l.rows + begin * kPanel, end - begin,
                                           sums + key * ld + column, ld);
      }
    }
  }

  // dq += ds * k
  void add_dq(const StripKeys* strips) {
    const BackwardLayout<V>& l = tile_.layout;
    for (int64_t column = 0; column < l.dk_ld; column += kPanel) {
      const float* panel = tile_.k_panels + column * l.keys;
      for (int r = 0; r < rows_; r += kStripRows) {
        const StripKeys& need = strips[r / kStripRows];
        if (need.begin >= need.end) continue;
        multiply_strip<V, Sums::kContinue>(tile_.ds + r * l.keys + need.begin, l.keys,
                                           panel + need.begin * kPanel, need.end - need.begin,
                                           tile_.dq + r * l.dk_ld + column, l.dk_ld);
      }
    }
  }

  void store_rows() {
    T* dq = static_cast<T*>(params_.dq) + block_->batch * params_.dq_stride.b;
    for (int r = 0; r < rows_; ++r) {
      store_scaled<V>(tile_.dq + r * tile_.layout.dk_ld, call_.head_dim, call_.scale,
                      dq + head(r) * params_.dq_stride.h + token(r) * params_.dq_stride.s);
      if (state_.slope_rows || state_.sink_rows) store_sums(r);
    }
  }

  // What the row adds to the gradients of its slope and its sink; 0, which is there already, if it
  // sees no key.
  void store_sums(int r) const {
    const int64_t row = row_index(r);
    const float lse = call_.lse[row], delta = tile_.delta[r];
    if (lse == -INFINITY) return;
    const float sink = call_.sinks ? std::exp(call_.sinks[head(r)] - lse) : 0.0f;
    const float error = sums_[r].delta_error(delta, sink, params_.dlse ? params_.dlse[row] : 0.0f);
    if (state_.slope_rows) state_.slope_rows[row] = sums_[r].slope(error);
    if (state_.sink_rows) state_.sink_rows[row] = -sink * (delta + error);
  }

  const BackwardState& state_;
  const BackwardParams& params_;
  const AttentionParams& call_;
  const BackwardTask& task_;
  BackwardTile<V> tile_;
  const Task* block_ = nullptr;
  int rows_ = 0;
  CallRow call_rows_[kMaxBackwardRows];
  MaskRun runs_[kMaxBackwardRows];  // of this tile
  RowSums sums_[kMaxBackwardRows];
  SumWidths widths_;
  float* dk_;  // [sum_keys, dk_ld]  this task's sums
  float* dv_;  // [sum_keys, dv_ld]
};

template <class V, class T>
void run_backward_task(const BackwardState& state, const BackwardTask& task, float* scratch,
                       float* sums) {
  BackwardRun<V, T>(state, task, scratch, sums).run();
}

// Writes one gradient of all keys of a KV head: the sums [keys of the task, ld] times a factor, and
// zeros for keys outside the task.
template <class V, class T>
void store_keys(const BackwardTask& task, const float* sums, int64_t ld, int64_t num_keys,
                int64_t dims, float factor, T* to, int64_t stride) {
  for (int64_t key = 0; key < num_keys; ++key, to += stride) {
    if (key < task.key_begin || key >= task.key_end) {
      for (int64_t d = 0; d < dims; ++d) to[d] = T{};
    } else {
      store_scaled<V>(sums + (key - task.key_begin) * ld, dims, factor, to);
    }
  }
}

template <class V, class T>
void store_backward_sums(const BackwardParams& params, const BackwardTask& task,
                         const float* sums) {
  const AttentionParams& call = params.call;
  const SumWidths widths = backward_sum_widths<V>(call).of(task);
  if (task.k_head >= 0) {
    T* dk = static_cast<T*>(params.dk) + task.batch * params.dk_stride.b +
            task.k_head * params.dk_stride.h;
    store_keys<V>(task, sums, widths.dk, call.kv_len, call.head_dim, call.scale, dk,
                  params.dk_stride.s);
  }
  if (task.v_head >= 0) {
    T* dv = static_cast<T*>(params.dv) + task.batch * params.dv_stride.b +
            task.v_head * params.dv_stride.h;
    store_keys<V>(task, sums + sum_keys(task) * widths.dk, widths.dv, call.kv_len,
                  call.value_head_dim, 1.0f, dv, params.dv_stride.s);
  }
}

template <class V>
int64_t backward_scratch_floats(const AttentionParams& params, const TileShape& tile) {
  return BackwardLayout<V>(params, tile).scratch_floats();
}

}  // namespace gqa::cpu::GQA_ISA
