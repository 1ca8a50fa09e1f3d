// The working set of one backward task in its worker's scratch memory.
#pragma once

#include <cstdint>

#include "../forward/schedule.h"
#include "../forward/tile.h"
#include "../isa/isa.h"

namespace gqa::cpu::GQA_ISA {

constexpr int kMaxBackwardRows = 144;
constexpr int kMaxBackwardKeys = 96;

template <class V>
struct BackwardLayout {
  static constexpr int kPanel = TileLayout<V>::kPanel;

  int64_t rows, keys;    // whole numbers of strips and panels
  int64_t q_ld, o_ld;    // row lengths of q and dout, padded with zeros
  int64_t dk_ld, dv_ld;  // row lengths of dq, dk and their panels; of dv and its panels
  int64_t row_ld;        // row length of the transposed scores

  BackwardLayout(const AttentionParams& params, const TileShape& tile)
      : rows(tile.rows),
        keys(round_up(tile.keys, kPanel)),
        q_ld(round_up(params.head_dim, kPanel)),
        o_ld(round_up(params.value_head_dim, V::kWidth)),
        dk_ld(round_up(params.head_dim, kPanel)),
        dv_ld(round_up(params.value_head_dim, kPanel)),
        row_ld(round_up(tile.rows, V::kWidth)) {}

  int64_t scratch_floats() const {
    return rows * (q_ld + o_ld + 2 * dk_ld + dv_ld) + keys * (q_ld + o_ld + dk_ld) +
           2 * row_ld * keys + (keys + kStripRows) * row_ld + 2 * rows + 2 * keys;
  }
};

template <class V>
struct BackwardTile {
  BackwardLayout<V> layout;
  float* q;            // [rows, q_ld]   queries in fp32
  float* dout;         // [rows, o_ld]   gradient of the output
  float* q_panels;     // [dk_ld / kPanel, rows, kPanel]
  float* dout_panels;  // [dv_ld / kPanel, rows, kPanel]
  float* dq;           // [rows, dk_ld]  not yet scaled
  float* k_columns;    // [keys / kPanel, D, kPanel]   packed for S
  float* v_columns;    // [keys / kPanel, Dv, kPanel]  packed for dP
  float* k_panels;     // [dk_ld / kPanel, keys, kPanel]  packed for dQ
  float* p;   // [row_ld, keys]  scores, then probabilities as the forward multiplied them with V
  float* ds;  // [row_ld, keys]  dP, then dS
  float* transposed;  // [keys, row_ld]  P, then dS
  float* lse;         // [rows]  in kScoreUnit; +infinity for rows that see no key
  float* delta;       // [rows]  rowsum(dout * out) - dlse
  float* bias;        // [keys]  additive mask of one row
  float* keep;        // [keys]  dropout's factors of one row

  BackwardTile(const BackwardLayout<V>& tile_layout, float* scratch) : layout(tile_layout) {
    float* next = scratch;
    const auto take = [&next](int64_t floats) {
      float* taken = next;
      next += floats;
      return taken;
    };
    const BackwardLayout<V>& l = layout;
    q = take(l.rows * l.q_ld);
    dout = take(l.rows * l.o_ld);
    q_panels = take(l.rows * l.dk_ld);
    dout_panels = take(l.rows * l.dv_ld);
    dq = take(l.rows * l.dk_ld);
    k_columns = take(l.keys * l.q_ld);
    v_columns = take(l.keys * l.o_ld);
    k_panels = take(l.keys * l.dk_ld);
    p = take(l.row_ld * l.keys);
    ds = take(l.row_ld * l.keys);
    transposed = take((l.keys + kStripRows) * l.row_ld);
    lse = take(l.rows);
    delta = take(l.rows);
    bias = take(l.keys);
    keep = take(l.keys);
  }
};

}  // namespace gqa::cpu::GQA_ISA
