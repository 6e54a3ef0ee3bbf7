// SPDX-License-Identifier: Apache-2.0
// Launches that may begin while the previous grid of the stream ends.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "hopper/device.h"

namespace sinkattn::hopper {

struct LaunchSize {
  int grid, threads;
  int shared_bytes = 0;
};

/// The kernel must call ptx::wait_for_previous_grid() before it touches memory.
template <class... Arguments>
Status launch_dependent(const char* name, void (*kernel)(Arguments...), const LaunchSize& size,
                        cudaStream_t stream, const Arguments&... arguments) {
  if (size.shared_bytes > 48 * 1024) {
    // A fraction of a microsecond, and right for every device.
    SINKATTN_RETURN_IF_ERROR(cuda_status(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             size.shared_bytes),
        name));
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(size.grid));
  config.blockDim = dim3(static_cast<unsigned>(size.threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(size.shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cuda_status(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

}  // namespace sinkattn::hopper
