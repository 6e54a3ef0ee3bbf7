// SPDX-License-Identifier: Apache-2.0
#include "hopper/instances/backward_keys_instance.cuh"

namespace sinkattn::hopper {

Status launch_key_pass_128(const BackwardArguments& arguments, DType dtype, unsigned grid,
                          cudaStream_t stream) {
  return launch_key_pass<128, 128>(arguments, dtype, grid, stream);
}

}  // namespace sinkattn::hopper
