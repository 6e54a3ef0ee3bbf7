// SPDX-License-Identifier: Apache-2.0
// Copies of row tiles by the copy engine.
#pragma once

#include <cstdint>

#include "common/sequence.h"
#include "hopper/core/tile.cuh"
#include "hopper/ptx/mbarrier.cuh"
#include "hopper/ptx/tma.cuh"

namespace sinkattn::hopper {

/// A tensor as a tensor map of `rows` rows (core/tensor_map.h), and the sequence and batch entry
/// that tiles are taken from. Boxes that lie outside the tensor as a whole are never copied: for
/// them the copy engine touches the map's base address, which is before the tensor. The parts of a
/// tile that they would fill with zeros are cleared once, by clear_unused().
struct TileSource {
  const CUtensorMap* map;
  std::int32_t row_shift;  ///< coordinate of row 0: rows - length, so that rows past it are clipped
  std::int32_t offset;     ///< first_row + length
  std::int32_t length, batch, slabs;

  __device__ TileSource(const CUtensorMap* map_, std::int64_t rows, const SequenceInfo& side,
                        int batch_, int columns)
      : map(map_),
        row_shift(static_cast<std::int32_t>(rows - side.length)),
        offset(static_cast<std::int32_t>(side.first_row + side.length)),
        length(static_cast<std::int32_t>(side.length)),
        batch(batch_),
        slabs((columns + slab_columns - 1) / slab_columns) {}

  /// Bytes that load() of a tile at `row` < length completes.
  template <class Tile, int BoxRows>
  __device__ std::uint32_t bytes(int row) const {
    constexpr int boxes = Tile::rows / BoxRows;
    const int inside = boxes == 1 ? 1 : min(boxes, (length - row + BoxRows - 1) / BoxRows);
    return slabs * inside * BoxRows * slab_row_bytes;
  }

  /// Rows [row, row + Tile::rows) of `head` to `destination`, in boxes of BoxRows rows, `row` <
  /// length; completes on `barrier`. Rows past the sequence and columns past the tensor become 0.
  template <class Tile, int BoxRows>
  __device__ void load(std::uint32_t destination, std::uint64_t* barrier, int row, int head) const {
    static_assert(Tile::rows % BoxRows == 0);
#pragma unroll
    for (int slab = 0; slab < Tile::slabs; ++slab) {
      if (slab >= slabs) break;
#pragma unroll
      for (int first = 0; first < Tile::rows; first += BoxRows) {
        if (first > 0 && row + first >= length) break;
        ptx::tma_load(destination + slab * Tile::slab_bytes + first * slab_row_bytes, map, barrier,
                      {slab * slab_columns, row_shift + row + first, offset, head, batch});
      }
    }
  }
};

/// Zeros the slabs of `tiles` consecutive tiles that hold no column of a tensor with `columns`, and
/// rows from `rows` on; all threads of the block, before fence.proxy.async and a barrier.
template <class Tile>
__device__ inline void clear_unused(char* first_tile, int tiles, int columns,
                                    int rows = Tile::rows) {
  const int used = (columns + slab_columns - 1) / slab_columns;
  if (used == Tile::slabs && rows >= Tile::rows) return;
  constexpr int chunks = Tile::bytes / 16;
  constexpr int slab_chunks = Tile::slab_bytes / 16;
  for (int i = threadIdx.x; i < tiles * chunks; i += blockDim.x) {
    const int slab = i % chunks / slab_chunks;
    const int row = i % slab_chunks / (slab_row_bytes / 16);
    if (slab >= used || row >= rows) {
      reinterpret_cast<uint4*>(first_tile)[i] = make_uint4(0, 0, 0, 0);
    }
  }
}

}  // namespace sinkattn::hopper
