// SPDX-License-Identifier: Apache-2.0
// The tiles of the forward kernels: the only home of these numbers. Each row names the entry of
// docs/tuning-log.md that chose it.
#pragma once

#include "hopper/kernels/forward_config.h"

namespace sinkattn::hopper {

/// Keys up to which a sequence is short: few key blocks per tile of query rows. Measured at 2048
/// (short tile 566 against 551 TFLOPS) and 8192 (663 against 686, 681 against 726); the border lies
/// between, where exactly is not measured.
inline constexpr int short_keys = 4096;

/// Growth of a row's maximum, in powers of two, up to which its reference stays (softmax.cuh).
/// FlashAttention-4's value; bf16, fp16 and the fp32 sums hold 2^8 times more without loss.
inline constexpr float tolerated_growth_log2 = 8.0f;

/// Share of the L2 for the keys and values of a section; queries and outputs stream through the
/// rest. Not swept yet.
inline constexpr double section_of_l2 = 0.6;

/// num_splits = 0: splits are considered below this many tiles per multiprocessor, a part has at
/// least this many key blocks, and there are at most so many parts. After FlashAttention-3's
/// heuristic (0.8; 4 blocks; 128). 64 tiles of 1x32768 keys, causal: 118 us, unsplit 217; the three
/// borders themselves are not swept.
inline constexpr double enough_tiles_per_sm = 0.8;
inline constexpr int least_blocks_per_split = 4;
inline constexpr int most_splits = 128;

/// ForwardTile<head_dim, head_dim_v, use>: key block, warpgroups of 64 rows, stages of the K and V
/// rings, stages of the Q ring, turns. Measurements: docs/tuning-log.md, "forward tiles".
template <int HeadDim, int HeadDimV, ForwardUse Use = ForwardUse::general>
struct ForwardTile;

template <>
struct ForwardTile<64, 64> {
  static constexpr ForwardShape shape{128, 3, 4, 2, true};
};
template <>
struct ForwardTile<64, 64, ForwardUse::window> {
  static constexpr ForwardShape shape{64, 4, 6, 2, false};
};
template <>
struct ForwardTile<96, 96> {
  static constexpr ForwardShape shape{96, 3, 3, 1, true};
};
template <>
struct ForwardTile<128, 128> {
  static constexpr ForwardShape shape{80, 3, 3, 1, true};
};
template <>
struct ForwardTile<128, 128, ForwardUse::short_keys> {
  static constexpr ForwardShape shape{128, 2, 2, 2, true};
};
template <>
struct ForwardTile<192, 128> {
  static constexpr ForwardShape shape{80, 3, 2, 1, true};
};
template <>
struct ForwardTile<192, 192> {
  static constexpr ForwardShape shape{112, 2, 2, 1, true};
};
template <>
struct ForwardTile<256, 256> {
  static constexpr ForwardShape shape{64, 2, 2, 1, true};
};

/// The same for paged keys. Of the tiles of head dim 128 the one of 128 keys, which pages of 64 and
/// more fill in larger boxes: 4x2048 of 8192, pages of 64, 3.21 ms; with 80 keys 3.24.
template <int HeadDim, int HeadDimV, ForwardUse Use = ForwardUse::general>
struct PagedTile : ForwardTile<HeadDim, HeadDimV, Use> {};

template <>
struct PagedTile<128, 128> : ForwardTile<128, 128, ForwardUse::short_keys> {};
// With blocks of 80 keys the registers of the page lookup spill.
template <>
struct PagedTile<192, 128> {
  static constexpr ForwardShape shape{64, 3, 2, 1, true};
};

}  // namespace sinkattn::hopper
