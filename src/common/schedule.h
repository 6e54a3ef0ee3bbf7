// SPDX-License-Identifier: Apache-2.0
// Block ranges: which key blocks a tile of query rows visits, which query blocks a tile of keys
// visits, and which of them need no mask. Derived from mask.h alone. Host and device.
//
// Why the ends of a tile are enough: a row's visible keys are one interval [begin, end), both ends
// never decrease with the row, and an interval that is not empty contains the row's own diagonal
// key. So over a tile of rows
//   the union of all intervals is [begin of the first row, end of the last row), without gaps;
//   their intersection is         [begin of the last row, end of the first row).
// The same holds for the rows that see a key, with keys and rows exchanged.
//
// A kernel's loop is three loops: masked blocks [n_begin, n_full_begin), unmasked ones
// [n_full_begin, n_full_end), masked ones [n_full_end, n_end), in whichever order. Without a left
// window and a chunk the first of them is always empty; without any mask only a ragged last block
// is left in the third.
#pragma once

#include <cstdint>

#include "common/mask.h"

namespace sinkattn {

/// Key blocks of a tile of query rows, in units of tile_n keys; block n holds the keys
/// [n * tile_n, (n + 1) * tile_n). n_begin <= n_full_begin <= n_full_end <= n_end.
template <class Int>
struct BasicKeyBlocks {
  Int n_begin = 0;       ///< blocks [n_begin, n_end) hold every key that the tile sees
  Int n_end = 0;         ///< n_begin: the tile sees nothing
  Int n_full_begin = 0;  ///< in [n_full_begin, n_full_end) every row sees every key
  Int n_full_end = 0;
};
using KeyBlocks = BasicKeyBlocks<std::int64_t>;

/// Query blocks of a tile of keys, in units of tile_m rows; block m holds the rows
/// [m * tile_m, (m + 1) * tile_m). m_begin <= m_full_begin <= m_full_end <= m_end.
template <class Int>
struct BasicQueryBlocks {
  Int m_begin = 0;       ///< blocks [m_begin, m_end) hold every row that sees the tile
  Int m_end = 0;         ///< m_begin: no row does
  Int m_full_begin = 0;  ///< in [m_full_begin, m_full_end) every row sees every key
  Int m_full_end = 0;
};
using QueryBlocks = BasicQueryBlocks<std::int64_t>;

/// ceil(a / b) for a >= 0, b > 0.
template <class Int = std::int64_t>
SINKATTN_HOST_DEVICE constexpr Int ceil_div(Int a, Same<Int> b) {
  return a / b + (a % b != 0 ? 1 : 0);
}

/// Key blocks of the query rows [row_begin, row_end) of a sequence. Rows from sq on do not count:
/// nothing of them is stored. Keys from sk on are invisible, so a ragged last block is never full.
template <class Int = std::int64_t>
SINKATTN_HOST_DEVICE constexpr BasicKeyBlocks<Int> key_blocks(const BasicMask<Int>& mask,
                                                              Same<Int> row_begin,
                                                              Same<Int> row_end, Same<Int> sq,
                                                              Same<Int> sk, Same<Int> tile_n) {
  if (row_end > sq) row_end = sq;
  if (row_begin >= row_end) return {};
  const BasicRange<Int> first = visible_keys(mask, row_begin, sq, sk);
  const BasicRange<Int> last = visible_keys(mask, row_end - 1, sq, sk);
  if (first.begin >= last.end) return {};
  BasicKeyBlocks<Int> blocks;
  blocks.n_begin = first.begin / tile_n;
  blocks.n_end = ceil_div(last.end, tile_n);
  blocks.n_full_begin = ceil_div(last.begin, tile_n);
  blocks.n_full_end = first.end / tile_n;
  if (blocks.n_full_end < blocks.n_full_begin) blocks.n_full_end = blocks.n_full_begin;
  return blocks;
}

/// Query blocks of the keys [key_begin, key_end) of a sequence. Keys from sk on are invisible: a
/// tile that reaches over the end has no full block. A kernel that zero-fills those keys may pass
/// key_end = sk instead. Rows from sq on do not count: the backward gives them LSE +inf, so that
/// their weights are 0.
template <class Int = std::int64_t>
SINKATTN_HOST_DEVICE constexpr BasicQueryBlocks<Int> query_blocks(const BasicMask<Int>& mask,
                                                                  Same<Int> key_begin,
                                                                  Same<Int> key_end, Same<Int> sq,
                                                                  Same<Int> sk, Same<Int> tile_m) {
  const bool ragged = key_end > sk;
  if (ragged) key_end = sk;
  if (key_begin >= key_end) return {};
  const BasicRange<Int> first = visible_queries(mask, key_begin, sq, sk);
  const BasicRange<Int> last = visible_queries(mask, key_end - 1, sq, sk);
  if (first.begin >= last.end) return {};
  BasicQueryBlocks<Int> blocks;
  blocks.m_begin = first.begin / tile_m;
  blocks.m_end = ceil_div(last.end, tile_m);
  blocks.m_full_begin = ceil_div(last.begin, tile_m);
  // A block that is cut off by the end of the sequence is as good as a whole one.
  blocks.m_full_end = first.end == sq ? ceil_div(sq, tile_m) : first.end / tile_m;
  if (ragged || blocks.m_full_end < blocks.m_full_begin) blocks.m_full_end = blocks.m_full_begin;
  return blocks;
}

/// Part `split` of `num_splits` consecutive parts of a range of blocks: sizes differ by at most
/// one, the larger ones come first; with fewer blocks than parts the last parts are empty.
template <class Int = std::int64_t>
SINKATTN_HOST_DEVICE constexpr BasicRange<Int> split_blocks(const BasicRange<Int>& blocks,
                                                            Same<Int> split, Same<Int> num_splits) {
  const Int size = blocks.size() / num_splits;
  const Int larger = blocks.size() % num_splits;
  const Int begin = blocks.begin + split * size + (split < larger ? split : larger);
  return {begin, begin + size + (split < larger ? 1 : 0)};
}

/// A query row of packed GQA: the rows of a KV head's group lie beside each other, head fastest.
template <class Int>
struct BasicPackedRow {
  Int position = 0;
  Int head_in_group = 0;
};
using PackedRow = BasicPackedRow<std::int64_t>;

template <class Int = std::int64_t>
SINKATTN_HOST_DEVICE constexpr BasicPackedRow<Int> unpack_row(Int row, Int group) {
  return {row / group, row % group};
}

/// Positions that the packed rows [row_begin, row_end) belong to: what key_blocks() is asked with.
template <class Int = std::int64_t>
SINKATTN_HOST_DEVICE constexpr BasicRange<Int> packed_positions(Int row_begin, Int row_end,
                                                                Int group) {
  if (row_begin >= row_end) return {};
  return {row_begin / group, ceil_div(row_end, group)};
}

}  // namespace sinkattn
