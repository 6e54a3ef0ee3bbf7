// SPDX-License-Identifier: Apache-2.0
// Which tile comes next. Executed by one whole warp (the producer's), one tile ahead of the work.
//
// Tiles are ordered section -> level -> (sequence, KV head) -> head of the group -> split. A
// section is a set of KV heads whose keys and values fit the L2 together. A level is the index of
// the tile of query rows within its sequence, from the last to the first: under a causal mask the
// longest tiles come first, over all sequences, so that the short ones fill the gaps at the end.
// Packed batches need no preparation: the sequences that reach a level are counted by ballots.
#pragma once

#include "common/sequence.h"
#include "hopper/kernels/forward.h"

namespace sinkattn::hopper {

/// Coordinates of one tile of query rows.
struct TileIndex {
  std::int32_t sequence, head, level, split;
};

/// Sequence `b` of a packed batch. Two further ones, without tokens, own the rows before the first
/// and after the last sequence, so that these are written as well.
__device__ inline BasicSequenceInfo<int> packed_sequence(const SequenceSide& side, int b,
                                                         int sequences) {
  if (b < sequences) return resolve_sequence<int>(side, b);
  BasicSequenceInfo<int> info;
  const int capacity = static_cast<int>(side.capacity);
  const int edge = clamp<int>(side.cu_seqlens[b == sequences ? sequences : 0], 0, capacity);
  info.first_row = b == sequences ? edge : 0;
  info.extent = b == sequences ? capacity - edge : edge;
  return info;
}

/// Where a walk over a packed batch stands. Kept in shared memory between tiles: the producer warps
/// live on few registers.
struct PackedCursor {
  int levels;          ///< tiles of the longest sequence
  int level, section;  ///< what is being handed out
  int start, count;    ///< its first tile number, and the sequences that reach this level
  int chunk, before;   ///< 32 sequences at a time: where the search is, and how many it passed
};

class TileScheduler {
 public:
  __device__ TileScheduler(const TileOrder& order, const SequenceSide& side, PackedCursor* cursor)
      : order_(order), side_(side), saved_(cursor) {
    if (!order.packed) return;
    int most = 0;
    for (int b = lane(); b < order.sequences + 2; b += 32) most = max(most, tiles_of(b));
    PackedCursor at{};
    at.levels = __reduce_max_sync(0xffffffffu, most);
    at.level = at.levels;
    lower_level(at);
    save(at);
  }

  /// The tile after `tile`. The counter is asked one tile early, so its latency is hidden.
  __device__ int next(int tile) const {
    if (order_.counter == nullptr) return tile + gridDim.x;
    int mine = 0;
    if (lane() == 0) mine = atomicAdd(order_.counter, 1) + gridDim.x;
    return __shfl_sync(0xffffffffu, mine, 0);
  }

  /// Coordinates of tile `tile`, false past the last. Called with increasing numbers.
  __device__ bool locate(int tile, TileIndex* index) {
    return order_.packed ? locate_packed(tile, index) : locate_dense(tile, index);
  }

 private:
  __device__ static int lane() { return threadIdx.x % 32; }

  __device__ int tiles_of(int b) const {
    const int extent = packed_sequence(side_, b, order_.sequences).extent;
    return (extent + order_.tile_rows - 1) / order_.tile_rows;
  }

  __device__ bool locate_dense(int tile, TileIndex* index) const {
    const int per_unit = order_.group * order_.splits;
    const int section = order_.section_of(tile / (per_unit * order_.levels));
    if (section >= order_.sections) return false;
    const int first = order_.first_unit(section);
    const int units = order_.first_unit(section + 1) - first;
    int rest = tile - first * per_unit * order_.levels;
    const int per_level = units * per_unit;
    const int level = rest / per_level;
    if (level >= order_.levels) return false;
    rest -= level * per_level;
    const int unit = first + rest / per_unit;
    rest %= per_unit;
    const int kv_heads = order_.heads / order_.group;
    index->level = order_.levels - 1 - level;
    index->sequence = unit / kv_heads;
    index->head = unit % kv_heads * order_.group + rest / order_.splits;
    index->split = rest % order_.splits;
    return true;
  }

  __device__ bool locate_packed(int tile, TileIndex* index) {
    PackedCursor at = *saved_;
    __syncwarp();
    while (tile - at.start >= at.count * section_tiles(at)) {
      at.start += at.count * section_tiles(at);
      if (at.level == 0) {
        if (++at.section == order_.sections) return false;
        at.level = at.levels;
      }
      lower_level(at);
    }
    const int rest = (tile - at.start) % section_tiles(at);
    index->sequence = nth_sequence(at, (tile - at.start) / section_tiles(at));
    index->level = at.level;
    index->head = order_.first_unit(at.section) * order_.group + rest / order_.splits;
    index->split = rest % order_.splits;
    save(at);
    return true;
  }

  __device__ void save(const PackedCursor& at) {
    if (lane() == 0) *saved_ = at;
    __syncwarp();
  }

  /// Tiles of one sequence on one level of the section.
  __device__ int section_tiles(const PackedCursor& at) const {
    const int units = order_.first_unit(at.section + 1) - order_.first_unit(at.section);
    return units * order_.group * order_.splits;
  }

  /// Goes to the next lower level and counts the sequences that reach it.
  __device__ void lower_level(PackedCursor& at) const {
    at.level = max(at.level - 1, 0);
    at.count = 0;
    for (int b = 0; b < order_.sequences + 2; b += 32) at.count += __popc(reaching(at.level, b));
    at.chunk = 0;
    at.before = 0;
  }

  /// Bit i: sequence first + i has a tile on this level.
  __device__ unsigned reaching(int level, int first) const {
    const int b = first + lane();
    return __ballot_sync(0xffffffffu, b < order_.sequences + 2 && tiles_of(b) > level);
  }

  /// The n-th sequence (from 0) that reaches this level; n never decreases within a level.
  __device__ int nth_sequence(PackedCursor& at, int n) const {
    unsigned here = reaching(at.level, at.chunk);
    while (n - at.before >= __popc(here)) {
      at.before += __popc(here);
      at.chunk += 32;
      here = reaching(at.level, at.chunk);
    }
    // The lane whose bit has n - before set bits below it.
    const bool mine = here >> lane() & 1 && __popc(here & ((1u << lane()) - 1)) == n - at.before;
    return at.chunk + __ffs(__ballot_sync(0xffffffffu, mine)) - 1;
  }

  const TileOrder& order_;
  const SequenceSide& side_;
  PackedCursor* saved_;
};

}  // namespace sinkattn::hopper
