// SPDX-License-Identifier: Apache-2.0
// Which keys and query tiles a block of the backward handles.
#pragma once

#include <cstdint>

#include "hopper/backward_tuning.h"
#include "hopper/kernels/backward.h"

namespace sinkattn::hopper {

/// Block index -> (pair, tile). A pair is (sequence, kv head, split) or (sequence, query head).
/// Sections of `section` pairs run one after the other, so that what they share stays in L2; inside
/// one the tile varies slowest, which starts the longest blocks of a causal mask first.
struct BlockPlace {
  int pair, tile;
};

__device__ inline BlockPlace place_block(unsigned index, int pairs, int tiles, int section) {
  const unsigned per_section = static_cast<unsigned>(section) * tiles;
  const int first = static_cast<int>(index / per_section) * section;
  const int inside = static_cast<int>(index % per_section);
  const int size = min(section, pairs - first);
  return {first + inside % size, inside / size};
}

/// The value, but the compiler cannot know: what depends on it is computed here, not kept.
__device__ inline unsigned opaque(unsigned value) {
  asm volatile("" : "+r"(value));
  return value;
}

/// Sequence b on both sides, and where its rows of statistics start.
struct SequencePair {
  int b;
  SequenceInfo queries, keys;

  __device__ SequencePair(const BackwardArguments& p, int b_)
      : b(b_), queries(resolve_sequence(p.side_q, b_)), keys(resolve_sequence(p.side_k, b_)) {}

  /// Index of row 0 of query head `head` in the arrays of row statistics.
  __device__ std::int64_t statistics(const BackwardArguments& p, int head) const {
    const std::int64_t batch = p.packed_q ? 0 : b;
    const std::int64_t first = p.packed_q ? PrepareLayout::padded_row(queries.first_row, b) : 0;
    return (batch * p.heads_q + head) * p.statistic_rows + first;
  }
};

/// Query rows that see one key, or keys that one row sees: [begin, begin + size).
struct VisibleInterval {
  int begin;
  unsigned size;

  __device__ bool contains(int i) const { return static_cast<unsigned>(i - begin) < size; }
};

__device__ inline VisibleInterval queries_of_key(const Mask& mask, std::int64_t key,
                                                 std::int64_t sq, std::int64_t sk) {
  const Range rows = visible_queries(mask, key, sq, sk);
  return {static_cast<int>(rows.begin), static_cast<unsigned>(rows.size())};
}

__device__ inline VisibleInterval keys_of_query(const Mask& mask, std::int64_t row, std::int64_t sq,
                                                std::int64_t sk) {
  if (row >= sq) return {0, 0};
  const Range keys = visible_keys(mask, row, sq, sk);
  return {static_cast<int>(keys.begin), static_cast<unsigned>(keys.size())};
}

/// Query tiles that keys [first, end) of a sequence meet: tiles [begin, end).
struct TileRange {
  int begin, end;
};

__device__ inline TileRange query_tiles(const Mask& mask, std::int64_t first, std::int64_t end,
                                        std::int64_t sq, std::int64_t sk) {
  if (end > sk) end = sk;
  if (first >= end) return {0, 0};
  const std::int64_t low = visible_queries(mask, first, sq, sk).begin;
  const std::int64_t high = visible_queries(mask, end - 1, sq, sk).end;
  if (low >= high) return {0, 0};
  return {static_cast<int>(low / backward_tile_queries),
          static_cast<int>((high + backward_tile_queries - 1) / backward_tile_queries)};
}

/// Query tiles [begin, end) whose rows see every one of keys [first, end): they need no mask. Rows
/// past the sequence need none either: their P is 0.
__device__ inline TileRange full_tiles(const Mask& mask, std::int64_t first, std::int64_t end,
                                       std::int64_t sq, std::int64_t sk) {
  if (end > sk) return {0, 0};
  constexpr std::int64_t tile = backward_tile_queries;
  const std::int64_t low = visible_queries(mask, end - 1, sq, sk).begin;
  const std::int64_t high = visible_queries(mask, first, sq, sk).end;
  return {static_cast<int>((low + tile - 1) / tile),
          static_cast<int>(high >= sq ? (sq + tile - 1) / tile : high / tile)};
}

/// Position in a ring of `Stages` slots with one full and one empty barrier each.
template <int Stages>
struct RingPosition {
  int slot = 0;
  std::uint32_t phase = 0;

  __device__ void advance() {
    if (++slot == Stages) {
      slot = 0;
      phase ^= 1;
    }
  }
};

}  // namespace sinkattn::hopper
