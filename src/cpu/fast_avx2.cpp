// SPDX-License-Identifier: Apache-2.0
// The blocked path compiled for one instruction set; the build sets the flags by this file's name.
#include "cpu/fast_tile.inl"
// The tile comes first: both directions build on it.
#include "cpu/fast_forward.inl"
// Backward uses the forward's headers.
#include "cpu/fast_backward.inl"

namespace sinkattn::cpu {

const FastPath& fast_path_avx2() {
  static constexpr FastPath path{
      "avx2",       forward_lane_bytes, forward_tile, backward_lane_bytes,
      prepare_tile, query_tile,         key_tile};
  return path;
}

}  // namespace sinkattn::cpu
