// SPDX-License-Identifier: Apache-2.0
// The general forward kernel, what its roles share: shared memory, rings, a tile's description.
#pragma once

#include <cstdint>

#include "hopper/core/scheduler.cuh"
#include "hopper/core/tile.cuh"
#include "hopper/kernels/forward.h"

namespace sinkattn::hopper {

/// A tile of query rows as the producer announces it to the consumers.
struct TileInfo {
  std::int32_t head, kv_head, split;
  std::int32_t batch, key_batch;            ///< entry of the tensors; 0 where packed
  std::int32_t first_position;              ///< of the tile in its sequence
  std::int32_t first_row, length, extent;   ///< of the sequence's queries; see SequenceInfo
  std::int32_t keys, key_end;               ///< their number, and the row after the last of them
  std::int32_t visible_begin, visible_end;  ///< paged: keys that any row of the tile sees
  std::int32_t block_begin, block_end;      ///< key blocks to visit
  bool valid;                               ///< false: there are no more tiles
};

template <class C>
struct ForwardSmem {
  using Query = Tile<C::tile_m, C::head_dim>;
  using Key = Tile<C::tile_n, C::head_dim>;
  using Value = Tile<C::tile_n, C::head_dim_v>;

  alignas(1024) unsigned char query[C::query_stages][Query::bytes];  ///< and the output on its way
  alignas(1024) unsigned char key[C::stages][Key::bytes];
  alignas(1024) unsigned char value[C::stages][Value::bytes];
  std::uint64_t query_full[C::query_stages], query_empty[C::query_stages];
  std::uint64_t key_full[C::stages], key_empty[C::stages];
  std::uint64_t value_full[C::stages], value_empty[C::stages];
  std::uint64_t tile_full[C::query_stages];
  std::uint64_t page_full;  ///< paged: values that the producer completes
  TileInfo tile[C::query_stages];
  PackedCursor cursor;

  static_assert(C::head_dim_v <= C::head_dim, "the output is staged in the query tile");
};

/// Position in a ring of stages, with the parity of its current round.
template <int Stages>
struct RingPosition {
  int stage = 0;
  std::uint32_t parity = 0;

  __device__ inline void advance() {
    if (++stage == Stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace sinkattn::hopper
