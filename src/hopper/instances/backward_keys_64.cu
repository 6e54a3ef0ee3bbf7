// SPDX-License-Identifier: Apache-2.0
#include "hopper/instances/backward_keys_instance.cuh"

namespace sinkattn::hopper {

Status launch_key_pass_64(const BackwardArguments& arguments, DType dtype, unsigned grid,
                          cudaStream_t stream) {
  return launch_key_pass<64, 64>(arguments, dtype, grid, stream);
}

}  // namespace sinkattn::hopper
