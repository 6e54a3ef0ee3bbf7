// SPDX-License-Identifier: Apache-2.0
// Tuning constants of the decode kernel, one row per pair of head dims. Measurements: H100 80GB
// HBM3, docs/tuning-log.md, "decode".
#pragma once

namespace sinkattn::hopper {

/// Query positions, and packed rows (positions x heads of a group), up to which the decode kernel
/// runs instead of the general one. A tile of 32 packed rows here takes as long as one of 192
/// positions of a head there (twice as long where the rows are 16). Group 8, us here and there:
/// head dim 64, 8x32768 keys, 32 positions 815, 864, 48 positions 1218, 865; 128, 8x4096, 16
/// positions 97, 147, 32 positions 185, 147; 256, 1x32768, 8 positions 150, 249, 16 positions 285,
/// 252.
constexpr long long decode_positions(long long head_dim) {
  return head_dim <= 96 ? 32 : head_dim <= 128 ? 24 : 12;
}
inline constexpr long long decode_rows = 512;

/// Blocks that share a row tile, at most, where the heuristic decides. 1x131072 tokens with one KV
/// head, 128 pieces: 20.7 us; the merge reads 32 pieces per lane and round trip to L2.
inline constexpr int decode_max_pieces = 128;
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
    // 128x8192: 717 us unsplit; {16, 3, 4, 4} 733, {32, 2, 3, 4} 739, {16, 6, 2, 4} 728,
    // {16, 3, 2, 8} 736. Window of 128: 8.6 us; with 2 or 3 blocks per SM 14 us.
    if (row_tiles == 1) return {16, 2, 4, 4};
    return {16, 3, 2, 4};  // not tuned: 16x4096 with 4 tokens 83 us, with one 72 us
  }
  if (head_dim <= 128 && head_dim_v <= 128) {
    // 128x8192: 1414 us; {16, 3, 2, 4} 1418, {16, 3, 1, 8} 1431, {16, 6, 1, 4} 1581.
    if (row_tiles == 1) return {16, 2, 2, 4};
    return {16, 3, 2, 4};  // not tuned
  }
  if (head_dim <= 192 && head_dim_v <= 128) return {16, 2, 2, 4};  // not tuned
  return {16, 3, 1, 4};  // not tuned; two slots would leave room for the overlap, but spill
}

/// A piece has at least this many key tiles (of warps * keys keys), so that short contexts are not
/// cut into pieces whose merge costs more than they save; `alone`: one sequence, whose pieces are
/// equal. 1x4096: 10.8 us, with 4 tiles 12.3.
inline constexpr int decode_min_tiles = 4;
inline constexpr int decode_min_tiles_alone = 2;

/// At most this many keys per row tile: one piece each, one launch, no merge. A second launch
/// without work costs 2.3 us, a block reads 256 keys in about 2 us.
inline constexpr int decode_unsplit_keys = 256;

/// More row tiles per sequence than this (long query chunks) fill the machine by themselves; they
/// are not split, and each has its own end of the visible keys. Not tuned.
inline constexpr int decode_balanced_row_tiles = 16;

}  // namespace sinkattn::hopper
