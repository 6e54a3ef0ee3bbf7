// SPDX-License-Identifier: Apache-2.0
// Tiles of 16-bit elements in shared memory, and the matrix descriptors that wgmma reads them with.
//
// A tile of R rows and C columns is ceil(C / 64) slabs. A slab is R rows of 128 bytes (64 columns),
// contiguous, 1024-byte aligned, with the 128-byte swizzle: the 16-byte chunk c of row r lies at
// chunk c ^ (r % 8). This is what the copy engine writes for boxes of 64 columns. One copy serves
// as K-major operand (columns are the k extent) and as MN-major operand (rows are the k extent).
#pragma once

#include <cstdint>

namespace sinkattn::hopper {

inline constexpr int slab_columns = 64;
inline constexpr int slab_row_bytes = 128;

template <int Rows, int Columns>
struct Tile {
  static_assert(Rows % 8 == 0, "swizzle atoms are 8 rows");
  static constexpr int rows = Rows;
  static constexpr int columns = Columns;
  static constexpr int slabs = (Columns + slab_columns - 1) / slab_columns;
  static constexpr int slab_bytes = Rows * slab_row_bytes;
  static constexpr int bytes = slabs * slab_bytes;
};

/// Byte offset of 16-byte chunk `chunk` (8 columns) of row `row` in a slab.
__device__ constexpr std::uint32_t swizzled_offset(std::uint32_t row, std::uint32_t chunk) {
  return row * slab_row_bytes + ((chunk ^ (row % 8)) * 16);
}

namespace descriptor {

// Bits: 0-13 address / 16, 16-29 leading byte offset / 16, 32-45 stride byte offset / 16,
// 62-63 swizzle (1: 128 bytes). PTX ISA, "Matrix descriptor format".
__device__ constexpr std::uint64_t make(std::uint32_t address, std::uint32_t leading_bytes) {
  constexpr std::uint64_t atom = 1024 / 16;  // 8 rows of 128 bytes
  return static_cast<std::uint64_t>((address & 0x3FFFF) >> 4) |
         static_cast<std::uint64_t>(leading_bytes >> 4) << 16 | atom << 32 | std::uint64_t{1} << 62;
}

/// Operand whose k extent runs along the columns of a slab, starting at `address` (any 8-row atom
/// of a slab). The k16 step kk of the whole tile is k_step(kk).
__device__ constexpr std::uint64_t k_major(std::uint32_t address) { return make(address, 16); }

/// Bytes / 16 to the k16 step `kk` of a K-major tile with slabs of `SlabBytes`.
template <int SlabBytes>
__device__ constexpr std::uint64_t k_step(int kk) {
  return (kk / 4) * (SlabBytes / 16) + (kk % 4) * 2;
}

/// Operand whose k extent runs along the rows; N extends over slabs `slab_bytes` apart.
__device__ constexpr std::uint64_t mn_major(std::uint32_t address, std::uint32_t slab_bytes) {
  return make(address, slab_bytes);
}

/// Bytes / 16 from one k16 step (16 rows) of an MN-major tile to the next.
inline constexpr std::uint64_t mn_step = 16 * slab_row_bytes / 16;

}  // namespace descriptor
}  // namespace sinkattn::hopper
