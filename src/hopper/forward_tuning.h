// SPDX-License-Identifier: Apache-2.0
// The tiles of the forward kernels: the only home of these numbers. Each row names the entry of
// docs/tuning-log.md that chose it.
#pragma once

#include "hopper/kernels/forward_config.h"

namespace sinkattn::hopper {

/// Keys up to which a sequence is short: few key blocks per tile of query rows.
inline constexpr int short_keys = 4096;

/// ForwardTile<head_dim, head_dim_v, use>: key block, warpgroups of 64 rows, stages of the K and V
/// rings, stages of the Q ring, turns, hidden part of the softmax. Measurements:
/// docs/tuning-log.md, "forward tiles".
template <int HeadDim, int HeadDimV, ForwardUse Use = ForwardUse::general>
struct ForwardTile;

template <>
struct ForwardTile<64, 64> {
  static constexpr ForwardShape shape{128, 3, 4, 2, true, Hidden::maximum};
};
template <>
struct ForwardTile<64, 64, ForwardUse::window> {
  static constexpr ForwardShape shape{64, 4, 6, 2, false, Hidden::maximum};
};
template <>
struct ForwardTile<96, 96> {
  static constexpr ForwardShape shape{96, 3, 3, 1, true, Hidden::nothing};
};
template <>
struct ForwardTile<128, 128> {
  static constexpr ForwardShape shape{80, 3, 3, 1, true, Hidden::nothing};
};
template <>
struct ForwardTile<128, 128, ForwardUse::short_keys> {
  static constexpr ForwardShape shape{128, 2, 2, 2, true, Hidden::maximum};
};
template <>
struct ForwardTile<192, 128> {
  static constexpr ForwardShape shape{80, 3, 2, 1, true, Hidden::nothing};
};
template <>
struct ForwardTile<192, 192> {
  static constexpr ForwardShape shape{112, 2, 2, 1, true, Hidden::nothing};
};
template <>
struct ForwardTile<256, 256> {
  static constexpr ForwardShape shape{80, 2, 2, 1, true, Hidden::nothing};
};

}  // namespace sinkattn::hopper
