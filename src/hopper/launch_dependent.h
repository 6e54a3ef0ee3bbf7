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
  int grid_y = 1;
};

/// Once per kernel, device and thread: allows `shared_bytes` of shared memory, and asks for the
/// largest share of L1 as shared memory. Kernels that follow each other closely must agree on that
/// share: an SM drains before it changes it, and then nothing overlaps.
Status prepare_launch(const void* kernel, const char* name, int shared_bytes);

/// The kernel must call ptx::wait_for_previous_grid() before it touches memory.
template <class... Arguments>
Status launch_dependent(const char* name, void (*kernel)(Arguments...), const LaunchSize& size,
                        cudaStream_t stream, const Arguments&... arguments) {
  SINKATTN_RETURN_IF_ERROR(
      prepare_launch(reinterpret_cast<const void*>(kernel), name, size.shared_bytes));
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(size.grid), static_cast<unsigned>(size.grid_y));
  config.blockDim = dim3(static_cast<unsigned>(size.threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(size.shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cuda_status(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

}  // namespace sinkattn::hopper
