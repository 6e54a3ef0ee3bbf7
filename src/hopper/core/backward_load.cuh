// SPDX-License-Identifier: Apache-2.0
// Copies of row tiles by the copy engine.
#pragma once

#include <cstdint>

#include "common/sequence.h"
#include "hopper/core/tile.cuh"
#include "hopper/ptx/mbarrier.cuh"
#include "hopper/ptx/tma.cuh"

namespace sinkattn::hopper {

/// A tensor as a tensor map of `rows` rows (core/tensor_map.h), and the sequence, head and batch
/// entry that tiles are taken from.
struct TileSource {
  const CUtensorMap* map;
  std::int32_t row_shift;  ///< coordinate of row 0: rows - length, so that rows past it are clipped
  std::int32_t offset;     ///< first_row + length
  std::int32_t batch;

  __device__ TileSource(const CUtensorMap* map_, std::int64_t rows, const SequenceInfo& side,
                        int batch_)
      : map(map_),
        row_shift(static_cast<std::int32_t>(rows - side.length)),
        offset(static_cast<std::int32_t>(side.first_row + side.length)),
        batch(batch_) {}

  /// Rows [row, row + Tile::rows) of `head` to `destination`, in boxes of BoxRows rows; completes
  /// Tile::bytes on `barrier`. Rows past the sequence and columns past the tensor become 0.
  template <class Tile, int BoxRows>
  __device__ void load(std::uint32_t destination, std::uint64_t* barrier, int row, int head) const {
    static_assert(Tile::rows % BoxRows == 0);
#pragma unroll
    for (int slab = 0; slab < Tile::slabs; ++slab) {
#pragma unroll
      for (int first = 0; first < Tile::rows; first += BoxRows) {
        ptx::tma_load(destination + slab * Tile::slab_bytes + first * slab_row_bytes, map, barrier,
                      {slab * slab_columns, row_shift + row + first, offset, head, batch});
      }
    }
  }
};

}  // namespace sinkattn::hopper
