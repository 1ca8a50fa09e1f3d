// What attention can compute besides its output and its LSE: the largest score of each query head,
// and the attention that each key gets from the last queries.
//
// A probability is known once its row's softmax is complete. Until then a task stores the scores of
// the rows that count; the last split to finish adds up the probabilities of all of them, key by
// key (key_scores.h). The first task of a (sequence, key head) writes its sums to the result, and
// the sums of the others are added at the end, in order.
#pragma once

#include <cstdint>
#include <vector>

#include "../../core/params.h"
#include "../aligned.h"
#include "schedule.h"

namespace gqa::cpu {

// The requested results; nullptr: not requested.
struct Auxiliary {
  float* max_scores = nullptr;  // [B, Hq], contiguous
  float* key_scores = nullptr;  // [B, Hk, Sk], contiguous, filled with zeros
  int64_t queries = 0;          // last queries of each sequence that count for key_scores
};

// The rows of a task that count for key_scores, and where their scores go.
struct ScoredRows {
  int first;                   // row; all rows after it count too
  int64_t key_begin, key_end;  // of all splits of the task
  int64_t row_floats;          // of the scores of one row
  float* scores;               // [rows, row_floats] of a task with splits; nullptr: one without
  int64_t place;               // of the scores of a task without, in a worker's memory
  float* sums;                 // [key_end - key_begin]
};

class AuxiliaryWork {
 public:
  AuxiliaryWork(const AttentionParams& params, const Schedule& schedule, const Auxiliary& wanted);

  // nullptr: no row of the task counts.
  const ScoredRows* rows_of(int64_t task) const {
    return rows_.empty() || rows_[task].sums == nullptr ? nullptr : &rows_[task];
  }
  // The largest score of each row, in the order of the LSE; nullptr: not wanted.
  float* row_max() const { return row_max_.get(); }
  // Memory of a worker for the scores of one bundle.
  int64_t worker_floats() const { return worker_floats_; }
  // After all tasks.
  void finish(const Schedule& schedule) const;

 private:
  struct Addition {
    const float* from;
    float* to;
    int64_t n;
  };
  void place_scores(const Schedule& schedule);
  void place_sums(const Schedule& schedule);

  const AttentionParams& params_;
  Auxiliary wanted_;
  std::vector<ScoredRows> rows_;  // by task
  std::vector<Addition> additions_;
  AlignedFloats sums_, row_max_;
  int64_t worker_floats_ = 0;
};

}  // namespace gqa::cpu
