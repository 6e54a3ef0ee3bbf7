// SPDX-License-Identifier: Apache-2.0
// Tuning constants of the decode kernel, one row per pair of head dims. Measurements: H100 80GB
// HBM3, docs/tuning-log.md, "decode".
#pragma once

namespace sinkattn::hopper {

inline constexpr int decode_max_pieces = 128;  ///< balanced mode: blocks that share a row tile
inline constexpr int decode_max_splits = 256;  ///< check.cpp refuses more

/// How a pair of head dims is run. `keys`: keys of one ring slot (a warp's step). `slots`: ring
/// slots per warp. `blocks`: resident blocks per SM, for shared memory and for registers. `warps`:
/// of a block; each streams keys of its own.
struct DecodeTuning {
  int keys, slots, blocks, warps;
};

/// Head dims of K and V (columns in shared memory), and 16-row tiles per block.
constexpr DecodeTuning decode_tuning(int head_dim, int head_dim_v, int row_tiles) {
  if (head_dim <= 64 && head_dim_v <= 64) {
    return row_tiles == 1 ? DecodeTuning{16, 2, 4, 4} : DecodeTuning{16, 3, 2, 4};
  }
  if (head_dim <= 128 && head_dim_v <= 128) {
    return row_tiles == 1 ? DecodeTuning{16, 2, 2, 4} : DecodeTuning{16, 3, 2, 4};
  }
  if (head_dim <= 192 && head_dim_v <= 128) return {16, 2, 2, 4};
  return {16, 3, 1, 4};
}

/// Balanced mode: a block takes at least this many key tiles (of warps * keys keys), so that
/// short contexts are not cut into pieces whose merge costs more than they save.
inline constexpr int decode_min_tiles = 4;

/// At most this many keys per row tile: one piece each, one launch, no merge.
inline constexpr int decode_unsplit_keys = 256;

/// More row tiles per sequence than this (long query chunks) fill the machine by themselves; they
/// are not split, and each has its own end of the visible keys.
inline constexpr int decode_balanced_row_tiles = 16;

}  // namespace sinkattn::hopper
