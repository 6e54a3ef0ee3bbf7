// SPDX-License-Identifier: Apache-2.0
// Launches that may begin while the previous grid of the stream ends.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "hopper/device.h"

namespace sinkattn::hopper {

/// The kernel must call ptx::wait_for_previous_grid() before it touches memory.
template <class... Arguments>
Status launch_dependent(const char* name, void (*kernel)(Arguments...), unsigned grid, int threads,
                        int smem, cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(smem);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cuda_status(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

}  // namespace sinkattn::hopper
