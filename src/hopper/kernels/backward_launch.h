// SPDX-License-Identifier: Apache-2.0
// The compiled instances of the backward's two passes, one per pair of head dims; each serves both
// dtypes, with and without softcap.
#pragma once

#include "hopper/kernels/backward.h"

namespace sinkattn::hopper {

struct BackwardInstance {
  CompiledDims dims;
  int key_pass_keys;    ///< keys per block of the key pass, and rows of its K and V boxes
  bool splits_for_l2;   ///< whether splitting the heads of a group pays where they overflow L2
  bool adds_in_turn;    ///< whether the key pass can add to dQ in a fixed order
  int query_pass_keys;  ///< keys per tile of the query pass, and rows of its K and V boxes
  Status (*key_pass)(const BackwardArguments&, DType, unsigned grid, cudaStream_t);
  Status (*query_pass)(const BackwardArguments&, DType, unsigned grid, cudaStream_t);
};

/// Query rows per block of the query pass.
inline constexpr int query_pass_queries = 128;

extern const BackwardInstance backward_64_64;
extern const BackwardInstance backward_96_96;
extern const BackwardInstance backward_128_128;
extern const BackwardInstance backward_192_128;
extern const BackwardInstance backward_256_256;

}  // namespace sinkattn::hopper
