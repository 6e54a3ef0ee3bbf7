// SPDX-License-Identifier: Apache-2.0
// The tiles of the forward kernels: the only home of these numbers. Each row names the entry of
// docs/tuning-log.md that chose it.
#pragma once

#include "hopper/kernels/forward_config.h"

namespace sinkattn::hopper {

/// ForwardTile<head_dim, head_dim_v>: key block, warpgroups of 64 rows, stages of the K and V
/// rings, stages of the Q ring, turns, hidden part of the softmax.
template <int HeadDim, int HeadDimV>
struct ForwardTile;

template <>
struct ForwardTile<64, 64> {
  static constexpr ForwardShape shape{128, 3, 4, 2, true, Hidden::maximum};
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
