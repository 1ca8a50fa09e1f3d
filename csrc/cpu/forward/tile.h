// The working set of a task in its worker's scratch memory: what the task keeps from its first tile
// of keys to its last, and what the tasks of a bundle share.
#pragma once

#include <cstdint>

#include "../aligned.h"
#include "../isa/isa.h"
#include "schedule.h"

namespace gqa::cpu::GQA_ISA {

// Rows of the packed micro-kernel; its columns are two vectors.
constexpr int kStripRows = 6;
inline int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

// How products take the rows of a task.
struct RowBlocks {
  int padding;  // rows are padded to a multiple of it
  int rows;     // whose scores are in memory at the same time
  // Whether direct tasks need the memory of packed K and V, too.
  bool few_pack = false;
};

// Whether direct tasks of the call multiply integers (products_int16.h).
template <class V>
bool uses_int16_products(const AttentionParams& params, const TileShape& tile) {
  return V::kHasInt16 && (params.k_dtype == DType::kInt8 || params.k_dtype == DType::kInt4) &&
         params.dtype != DType::kFloat32 && !tile.packs;
}

template <class V>
struct TileLayout {
  static constexpr int kPanel = 2 * V::kWidth;

  int64_t rows;         // of the task, padded to a multiple of RowBlocks::padding
  int64_t s_rows;       // rows of s
  int64_t keys;         // a whole number of panels
  int64_t q_ld, o_ld;   // row lengths of q and o, padded with zeros
  int64_t packed_keys;  // keys of the packed K and V; 0 where nothing is packed
  int64_t int16_ld;     // row length of q_int16; 0 unless products are of integers
  int64_t total_rows;   // rows of the segments' total; 0 if keys have no segments

  // task_rows: at most tile.rows
  TileLayout(const AttentionParams& params, const TileShape& tile, const RowBlocks& blocks,
             int task_rows)
      : rows(round_up(task_rows, blocks.padding)),
        s_rows(most_score_rows(tile, blocks)),
        keys(tile.keys),
        q_ld(round_up(params.head_dim, kPanel)),
        o_ld(round_up(params.value_head_dim, kPanel)),
        packed_keys(tile.packs || blocks.few_pack ? tile.keys : 0),
        int16_ld(uses_int16_products<V>(params, tile) ? round_up(params.head_dim, 2 * kPanel) : 0),
        total_rows(tile.segment_keys > 0 ? rows : 0) {}

  // Each a whole number of cache lines.
  int64_t own_floats() const {
    return round_up(rows * (q_ld + o_ld + 3) + rows * int16_ld + total_rows * (o_ld + 2),
                    kFloatsPerLine);
  }
  int64_t shared_floats() const {
    return round_up(s_rows * keys + packed_keys * (q_ld + o_ld) + 6 * keys + second_s_floats(),
                    kFloatsPerLine);
  }
  int64_t second_s_floats() const { return int16_ld > 0 ? s_rows * keys : 0; }

 private:
  static int64_t most_score_rows(const TileShape& tile, const RowBlocks& blocks) {
    const int64_t most = round_up(tile.rows, blocks.padding);
    return most < blocks.rows ? most : blocks.rows;
  }
};

template <class V>
struct Tile {
  TileLayout<V> layout;
  // The task's own:
  float* q;          // [rows, q_ld]  queries in fp32
  float* o;          // [rows, o_ld]  output, not yet divided by the sum
  float* max;        // [rows]  running maximum of the scores
  float* sum;        // [rows]  running sum of exp(score - max)
  float* q_sum;      // [rows]  sums of the rows of q; of a quantised cache
  int16_t* q_int16;  // [2, rows, int16_ld]  both parts of q, for products of integers
  // The same of all earlier segments of keys: o, max and sum are then of one segment.
  float *total_o, *total_max, *total_sum;
  // Of one tile of keys, of no use after it:
  float* s;                 // [s_rows, keys]  scores, then probabilities
  float* second_s;          // [s_rows, keys]  scores of the second parts of q
  float* k_panels;          // [keys / kPanel, D, kPanel]    packed K
  float* v_panels;          // [o_ld / kPanel, keys, kPanel]  packed V
  float* bias;              // [keys]  additive mask of one row
  float* keep;              // [keys]  dropout's factors of one row
  float *k_scale, *k_zero;  // [keys]  of a quantised cache
  float *v_scale, *v_zero;  // [keys]

  Tile(const TileLayout<V>& tile_layout, float* own, float* shared) : layout(tile_layout) {
    const auto take = [](float*& next, int64_t floats) {
      float* taken = next;
      next += floats;
      return taken;
    };
    q = take(own, layout.rows * layout.q_ld);
    o = take(own, layout.rows * layout.o_ld);
    max = take(own, layout.rows);
    sum = take(own, layout.rows);
    q_sum = take(own, layout.rows);
    q_int16 = reinterpret_cast<int16_t*>(take(own, layout.rows * layout.int16_ld));
    total_o = take(own, layout.total_rows * layout.o_ld);
    total_max = take(own, layout.total_rows);
    total_sum = take(own, layout.total_rows);
    s = take(shared, layout.s_rows * layout.keys);
    second_s = take(shared, layout.second_s_floats());
    k_panels = take(shared, layout.packed_keys * layout.q_ld);
    v_panels = take(shared, layout.packed_keys * layout.o_ld);
    bias = take(shared, layout.keys);
    keep = take(shared, layout.keys);
    k_scale = take(shared, layout.keys);
    k_zero = take(shared, layout.keys);
    v_scale = take(shared, layout.keys);
    v_zero = take(shared, layout.keys);
  }
};

// The keys of a tile that a run of rows needs, counted from the tile's first key; empty where begin
// >= end.
struct StripKeys {
  int begin, end;
};

}  // namespace gqa::cpu::GQA_ISA
