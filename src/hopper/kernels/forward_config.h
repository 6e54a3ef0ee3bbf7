// SPDX-License-Identifier: Apache-2.0
// Compile-time choices of a forward kernel.
#pragma once

#include <cstdint>

namespace sinkattn::hopper {

/// What a problem may ask for beside the general tile of its head dims.
enum class ForwardUse {
  general,
  window,  ///< a left window or a chunk: few key blocks per tile
  short_keys,
};

struct ForwardShape {
  int tile_n;        ///< keys per block
  int warpgroups;    ///< consumers of 64 query rows each
  int stages;        ///< of the K ring and of the V ring
  int query_stages;  ///< of the Q ring; the output leaves from there
  bool turns;        ///< warpgroups issue their products in a fixed order
};

/// `Paged`: keys and values lie in pages that a table lists.
template <class T, int HeadDim, int HeadDimV, ForwardShape Shape, bool Paged = false>
struct ForwardConfig {
  using Element = T;
  static constexpr int head_dim = HeadDim, head_dim_v = HeadDimV;
  static constexpr int tile_n = Shape.tile_n, warpgroups = Shape.warpgroups;
  static constexpr int tile_m = 64 * warpgroups;
  static constexpr int stages = Shape.stages, query_stages = Shape.query_stages;
  static constexpr bool turns = Shape.turns;
  static constexpr bool paged = Paged;
  static constexpr int threads = 128 * (warpgroups + 1);
  // All registers that the launch gives a block, per four threads: 40 + 2 * 232, 32 + 3 * 160,
  // 32 + 4 * 112.
  static constexpr int producer_registers = warpgroups == 2 ? 40 : 32;
  static constexpr int consumer_registers = warpgroups == 2 ? 232 : warpgroups == 3 ? 160 : 112;
  static_assert(warpgroups >= 2 && warpgroups <= 4);
};

}  // namespace sinkattn::hopper
