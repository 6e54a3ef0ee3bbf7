// SPDX-License-Identifier: Apache-2.0
// The compiled instances of the backward's main kernels. Each unit in instances/ defines one pair
// of head dims for both dtypes, with and without softcap.
#pragma once

#include "hopper/kernels/backward.h"

namespace sinkattn::hopper {

/// Keys per block of the key pass.
inline constexpr int key_pass_keys = 128;

Status launch_key_pass_64(const BackwardArguments& arguments, DType dtype, unsigned grid,
                          cudaStream_t stream);
Status launch_key_pass_96(const BackwardArguments& arguments, DType dtype, unsigned grid,
                          cudaStream_t stream);
Status launch_key_pass_128(const BackwardArguments& arguments, DType dtype, unsigned grid,
                           cudaStream_t stream);

}  // namespace sinkattn::hopper
