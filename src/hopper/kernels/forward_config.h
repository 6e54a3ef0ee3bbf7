// SPDX-License-Identifier: Apache-2.0
// Compile-time choices of a forward kernel.
#pragma once

#include <cstdint>

namespace sinkattn::hopper {

struct ForwardShape {
  int tile_n;              ///< keys per block
  int warpgroups;          ///< consumers of 64 query rows each
  int stages;              ///< of the K ring and of the V ring
  int query_stages;        ///< of the Q ring; the output leaves from there
  bool turns;              ///< warpgroups issue their products in a fixed order
  bool hide_exponentials;  ///< P V runs under the maximum and the exponentials, not the maximum
                           ///< alone
};

template <class T, int HeadDim, int HeadDimV, ForwardShape Shape>
struct ForwardConfig {
  using Element = T;
  static constexpr int head_dim = HeadDim, head_dim_v = HeadDimV;
  static constexpr int tile_n = Shape.tile_n, warpgroups = Shape.warpgroups;
  static constexpr int tile_m = 64 * warpgroups;
  static constexpr int stages = Shape.stages, query_stages = Shape.query_stages;
  static constexpr bool turns = Shape.turns;
  static constexpr bool hide_exponentials = Shape.hide_exponentials;
  static constexpr int threads = 128 * (warpgroups + 1);
  // All of an SM's registers: 40 + 2 * 232 or 32 + 3 * 160 per four threads.
  static constexpr int producer_registers = warpgroups == 2 ? 40 : 32;
  static constexpr int consumer_registers = warpgroups == 2 ? 232 : 160;
  static_assert(warpgroups == 2 || warpgroups == 3);
};

}  // namespace sinkattn::hopper
