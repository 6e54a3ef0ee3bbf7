// SPDX-License-Identifier: Apache-2.0
// Which piece of the work a decode block does. A row tile (sequence, tile of packed query rows, KV
// head) is cut along its keys into pieces. Two ways of cutting:
//   splits = n   every row tile in n equal pieces, one block each. With n = 1 a row's result
//   depends
//                on nothing but the row.
//   splits = 0   all key tiles of the batch in one line (sequence, row tile, KV head fastest), the
//                line cut in equal parts, one per block of a grid that fills the machine once. A
//                block ends the row tile it starts in, does whole ones, and begins a last one.
// Lengths are read here, on the device, and every value that comes from an index tensor is clamped
// by common/sequence.h.
#pragma once

#include <cstdint>

#include "common/sequence.h"
#include "hopper/decode_tuning.h"
#include "hopper/kernels/decode.h"

namespace sinkattn::hopper {

/// Keys [begin, end) of one row tile, as tokens of the sequence, and where their result goes.
struct DecodePiece {
  int b, kv_head, row_tile;
  int key_begin, key_end;
  int index, count;  ///< this piece, and how many the row tile has
  int entry;         ///< of the row tile in the list of what is to be merged
};

/// One sequence as the kernel needs it; equal in all threads. Lengths, and the key tiles of a whole
/// batch that is shared out, are below 2^30 (dispatch, decode.cpp).
template <int RowTile, int TileKeys>
struct DecodeSequence {
  using Keys = BasicRange<int>;

  int rows;  ///< packed query rows: positions * group
  int length_q, length_k;
  int first_q;     ///< row of position 0 in the query tensor
  int first_slot;  ///< slot of token 0

  DecodeSequence() = default;

  __device__ DecodeSequence(const DecodeParams& p, int b) {
    const auto q = resolve_sequence<int>(p.side_q, b);
    const auto k = resolve_sequence<int>(p.side_k, b);
    length_q = q.length;
    length_k = k.length;
    first_q = q.first_row;
    first_slot = k.first_row;
    rows = length_q * p.group;
  }

  __device__ int row_tiles() const { return (rows + RowTile - 1) / RowTile; }

  __device__ Keys keys_of_row(const DecodeParams& p, int row) const {
    return visible_keys(p.mask, p.by_group.divide(row), length_q, length_k);
  }

  /// Keys that packed rows first to last see (both ends of the interval never decrease).
  __device__ Keys keys_of(const DecodeParams& p, int first, int last) const {
    if (last < first) return {};
    return {keys_of_row(p, first).begin, keys_of_row(p, last).end};
  }

  __device__ Keys keys_of_tile(const DecodeParams& p, int row_tile) const {
    const int first = row_tile * RowTile;
    return keys_of(p, first, min(first + RowTile, rows) - 1);
  }

  __device__ static int tiles_of(const Keys& keys) {
    return keys.empty() ? 1 : (keys.size() + TileKeys - 1) / TileKeys;
  }

  /// Key tiles of any row of the sequence; at least 1.
  __device__ int key_tiles(const DecodeParams& p) const {
    return tiles_of(keys_of(p, 0, rows - 1));
  }

  /// Key tiles of all row tiles and KV heads: the sequence's share of the line.
  __device__ int line_length(const DecodeParams& p, int tiles) const {
    return tiles * row_tiles() * p.heads_kv;
  }
};

/// The pieces of this block, in order. Lives in shared memory: thread 0 moves it on, all threads
/// read the current piece from it where they need it instead of holding it in registers.
template <int RowTile, int TileKeys, int Warps>
class DecodeWork {
 public:
  using Sequence = DecodeSequence<RowTile, TileKeys>;
  static constexpr int threads = 32 * Warps;

  DecodePiece piece, last_piece;     ///< current, and the one before
  Sequence sequence, last_sequence;  ///< of the pieces

  /// By all threads, once, before next().
  __device__ void begin(const DecodeParams& p) {
    if (threadIdx.x == 0) {
      left_ = 0;
      b_ = unit_ = tile_ = 0;
      line_ = 0;
      part_begins_cut_ = false;
    }
    if (p.splits == 0) find_part(p);
  }

  /// By all threads: moves to the next piece, or returns false when the block is done.
  __device__ bool next(const DecodeParams& p) {
    __syncthreads();
    if (threadIdx.x == 0) {
      last_piece = piece;
      last_sequence = sequence;
      more_ = p.splits > 0 ? take_static(p) : take_balanced(p);
    }
    __syncthreads();
    return more_;
  }

  /// By one thread at the end: the row tile that this block began and others continue, if any.
  __device__ void list_cut(const DecodeParams& p) const {
    if (p.splits > 0) {
      if (piece.index == 0) p.cuts[piece.entry] = describe_cut();
    } else if (!p.list_by_unit) {
      p.cuts[blockIdx.x] = part_begins_cut_ ? describe_cut() : DecodeCut{};
    }
  }

 private:
  __device__ DecodeCut describe_cut() const {
    DecodeCut cut = {};
    cut.first_q = sequence.first_q;
    cut.pieces = piece.count;
    cut.entry = piece.entry;
    cut.b = piece.b;
    cut.kv_head = piece.kv_head;
    cut.first_row = piece.row_tile * RowTile;
    cut.rows = min(RowTile, sequence.rows - cut.first_row);
    return cut;
  }

  /// Heads vary fastest, so that blocks which run together read neighbouring heads of the same
  /// tokens. Where there are too few keys for p.splits pieces, the last blocks have nothing to do.
  __device__ bool take_static(const DecodeParams& p) {
    if (left_ < 0) return false;
    left_ = -1;
    int rest = blockIdx.x / p.heads_kv;
    piece.kv_head = blockIdx.x % p.heads_kv;
    piece.index = rest % p.splits;
    rest /= p.splits;
    piece.row_tile = rest % p.row_tiles;
    piece.b = rest / p.row_tiles;
    piece.entry = rest * p.heads_kv + piece.kv_head;
    piece.count = 0;
    sequence = Sequence(p, piece.b);
    if (piece.row_tile >= sequence.row_tiles()) return false;
    const auto keys = sequence.keys_of_tile(p, piece.row_tile);
    const int tiles = Sequence::tiles_of(keys);
    piece.count = min(p.splits, p.min_tiles > 1 ? max(1, tiles / p.min_tiles) : p.splits);
    if (piece.index >= piece.count) return false;
    // Pieces differ by at most one tile; the longer ones come first.
    const int least = tiles / piece.count;
    const int longer = tiles - least * piece.count;
    const int first = piece.index * least + min(piece.index, longer);
    set_keys(keys, first, first + least + (piece.index < longer ? 1 : 0));
    return true;
  }

  __device__ void set_keys(const BasicRange<int>& keys, int first_tile, int end_tile) {
    piece.key_begin = min(keys.begin + first_tile * TileKeys, keys.end);
    piece.key_end = max(min(keys.begin + end_tile * TileKeys, keys.end), piece.key_begin);
  }

  __device__ bool take_balanced(const DecodeParams& p) {
    if (left_ <= 0) return false;
    while (unit_ >= sequence.row_tiles() * p.heads_kv) {  // passes sequences without rows, too
      line_ += sequence.line_length(p, tiles_);
      if (++b_ >= p.batch) return false;
      sequence = Sequence(p, b_);
      tiles_ = sequence.key_tiles(p);
      unit_ = 0;
    }
    const int unit_begin = line_ + unit_ * tiles_;
    const int first = unit_begin / part_;
    const int last = (unit_begin + tiles_ - 1) / part_;
    const int take = min(left_, tiles_ - tile_);
    piece.b = b_;
    piece.kv_head = unit_ % p.heads_kv;
    piece.row_tile = unit_ / p.heads_kv;
    set_keys(sequence.keys_of_tile(p, piece.row_tile), tile_, tile_ + take);
    piece.index = static_cast<int>(blockIdx.x) - first;
    piece.count = last - first + 1;
    piece.entry = first;
    part_begins_cut_ = piece.index == 0 && piece.count > 1;
    if (p.list_by_unit && piece.index == 0) {
      p.cuts[(b_ * p.row_tiles + piece.row_tile) * p.heads_kv + piece.kv_head] = describe_cut();
    }
    left_ -= take;
    tile_ = 0;
    ++unit_;
    return true;
  }

  /// What the threads of the block have measured, together.
  struct Totals {
    int sum, before;  ///< before: the sum of earlier threads
    int longest, shortest;
  };

  __device__ Totals total(int value, int longest, int shortest) {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    int sum = value;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += other;
    }
    longest = __reduce_max_sync(0xffffffffu, longest);
    shortest = __reduce_min_sync(0xffffffffu, shortest);
    __syncthreads();  // the previous use of the arrays is over
    if (lane == 31) {
      sums_[warp] = sum;
      longest_[warp] = longest;
      shortest_[warp] = shortest;
    }
    __syncthreads();
    Totals totals = {0, sum - value, 1, 1 << 30};
#pragma unroll
    for (int w = 0; w < Warps; ++w) {
      if (w < warp) totals.before += sums_[w];
      totals.sum += sums_[w];
      totals.longest = max(totals.longest, longest_[w]);
      totals.shortest = min(totals.shortest, shortest_[w]);
    }
    return totals;
  }

  /// One sequence per thread, from `base` on.
  struct Candidate {
    Sequence sequence;
    int b, tiles = 0;
    int length = 0;

    __device__ Candidate(const DecodeParams& p, int base)
        : b(base + static_cast<int>(threadIdx.x)) {
      if (b >= p.batch) return;
      sequence = Sequence(p, b);
      tiles = sequence.key_tiles(p);
      length = sequence.line_length(p, tiles);
    }
  };

  /// Length of the line, length of a part, and the sequence in which this block's part begins.
  /// Every block finds the same numbers from the same lengths; nothing is exchanged.
  __device__ void find_part(const DecodeParams& p) {
    Candidate candidate(p, 0);
    Totals totals =
        total(candidate.length, candidate.tiles, candidate.tiles > 0 ? candidate.tiles : 1 << 30);
    int sum = totals.sum;
    int longest = totals.longest;
    int shortest = totals.shortest;
    for (int base = threads; base < p.batch; base += threads) {
      const Candidate next(p, base);
      const Totals more = total(next.length, next.tiles, next.tiles > 0 ? next.tiles : 1 << 30);
      sum += more.sum;
      longest = max(longest, more.longest);
      shortest = min(shortest, more.shortest);
    }
    int part = (sum + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x);
    part = max(part, p.min_tiles);
    part = max(part, longest / (decode_max_pieces - 2) + 1);
    if (shortest == longest) part = whole_pieces(part, longest);
    const int start = part * static_cast<int>(blockIdx.x);
    if (threadIdx.x == 0) {
      part_ = part;
      left_ = min(part, sum - start);
    }
    int line = 0;
    for (int base = 0; start < sum; base += threads) {
      if (base > 0) {
        candidate = Candidate(p, base);
        totals = total(candidate.length, 1, 1);
      }
      if (start < line + totals.sum) {  // the same in all threads
        begin_at(candidate, line + totals.before, start);
        break;
      }
      line += totals.sum;
    }
  }

  /// By all threads; the one whose sequence contains `start` sets the block's position.
  __device__ void begin_at(const Candidate& candidate, int line, int start) {
    if (start < line || start >= line + candidate.length) return;
    sequence = candidate.sequence;
    tiles_ = candidate.tiles;
    b_ = candidate.b;
    line_ = line;
    unit_ = (start - line) / tiles_;
    tile_ = (start - line) - unit_ * tiles_;
  }

  /// Equal sequences: a part of whole row tiles, or an equal piece of one, where that is at most
  /// 1/16 longer. Fewer pieces are worth more than the last few per cent of balance.
  __device__ static int whole_pieces(int part, int tiles) {
    const int rounded = part >= tiles ? (part + tiles - 1) / tiles * tiles
                                      : (tiles + tiles / part - 1) / (tiles / part);
    return rounded <= part + part / 16 ? rounded : part;
  }

  int left_;  ///< key tiles of this block's part that are not taken; static: 0, then -1
  int line_;  ///< key tiles before sequence b_
  int part_;  ///< key tiles of a block
  int sums_[Warps];
  int longest_[Warps], shortest_[Warps];
  int b_, unit_, tile_, tiles_;
  bool more_;
  bool part_begins_cut_;
};

}  // namespace sinkattn::hopper
