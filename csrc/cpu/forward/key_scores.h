// The attention that keys get from the rows of one task: scores are stored tile by tile, and become
// sums of probabilities when the rows' softmax is complete. See auxiliary.h.
#pragma once

#include <cmath>
#include <cstdint>

#include "../isa/isa.h"
#include "../isa/math.h"
#include "auxiliary.h"
#include "softmax.h"
#include "tile.h"

namespace gqa::cpu::GQA_ISA {

template <class V, class S, int kMaxRows>
class KeyScores {
 public:
  // rows: nullptr if no row of the task counts. worker_memory: of AuxiliaryWork::worker_floats.
  KeyScores(const ScoredRows* rows, int num_rows, float* worker_memory)
      : rows_(rows), num_rows_(num_rows), first_(rows != nullptr ? rows->first : num_rows) {
    if (rows != nullptr) {
      scores_ = rows->scores != nullptr ? rows->scores : worker_memory + rows->place;
    }
  }

  bool counts(int r) const { return r >= first_; }

  // The tile of keys [first_key, first_key + n) of which the next calls speak.
  void begin_tile(int64_t first_key, int n) {
    if (rows_ == nullptr) return;
    column_ = first_key - rows_->key_begin;
    keys_ = n;
  }

  // No row sees any key of the tile.
  void hide_all() {
    for (int r = first_; r < num_rows_; ++r) hide(r);
  }

  // Row r, which counts, sees no key of the tile.
  void hide(int r) {
    float* to = row(r);
    for (int i = 0; i < keys_; ++i) to[i] = -INFINITY;
  }

  // The finished scores of row r, which counts; there are none outside the strip.
  void store(int r, const float* scores, const StripKeys& strip) {
    float* to = row(r);
    for (int i = 0; i < strip.begin; ++i) to[i] = -INFINITY;
    for (int i = strip.begin; i < strip.end; ++i) to[i] = scores[i];
    for (int i = strip.end; i < keys_; ++i) to[i] = -INFINITY;
  }

  // The row's softmax: a probability is factor * exp(score - max). factor: 0 if it sees no key.
  void end_row(int r, float max, float factor) {
    base_[r] = factor == 0.0f ? 0.0f : max;
    factor_[r] = factor;
  }

  // Sums the probabilities of all rows, whose softmax is complete.
  void sum() const {
    if (rows_ == nullptr) return;
    const int64_t n = rows_->key_end - rows_->key_begin;
    for (int64_t j = 0; j < n; j += V::kWidth) {
      typename V::F total = V::set1(0.0f);
      const float* scores = scores_ + j;
      for (int begin = first_; begin < num_rows_; begin += kSummedRows) {
        const int end = num_rows_ - begin < kSummedRows ? num_rows_ : begin + kSummedRows;
        typename V::F part =
            V::set1(0.0f);  // sums of sums, because rounding grows with their length
        for (int r = begin; r < end; ++r, scores += rows_->row_floats) {
          const typename V::F s = V::sub(V::load(scores), V::set1(base_[r]));
          part = V::fma(exp_score<V, S>(s), V::set1(factor_[r]), part);
        }
        total = V::add(total, part);
      }
      if (j + V::kWidth <= n) {
        V::store(rows_->sums + j, total);
      } else {
        store_partial<V>(rows_->sums + j, total, n - j);
      }
    }
  }

 private:
  static constexpr int kSummedRows = 8;

  float* row(int r) const { return scores_ + (r - first_) * rows_->row_floats + column_; }

  const ScoredRows* rows_;
  int num_rows_, first_;
  float* scores_ = nullptr;
  int64_t column_ = 0;
  int keys_ = 0;
  float base_[kMaxRows], factor_[kMaxRows];
};

}  // namespace gqa::cpu::GQA_ISA
