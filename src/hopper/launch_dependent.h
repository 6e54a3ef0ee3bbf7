// SPDX-License-Identifier: Apache-2.0
// Launches that may begin while the previous grid of the stream ends.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "hopper/device.h"

namespace sinkattn::hopper {

/// Lets `kernel` have more than 48 KiB of shared memory and, if asked, clusters of up to 16 blocks.
/// Cheap enough for every call (a fraction of a microsecond), and right for every device.
template <class Kernel>
Status allow_launch(const char* name, Kernel* kernel, int shared_bytes, bool large_clusters) {
  SINKATTN_RETURN_IF_ERROR(cuda_status(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
      name));
  if (!large_clusters) return {};
  return cuda_status(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), name);
}

struct LaunchSize {
  int grid, threads;
  int shared_bytes = 0;
  int cluster = 1;
};

/// The kernel must call ptx::wait_for_previous_grid() before it touches memory.
template <class... Arguments>
Status launch_dependent(const char* name, void (*kernel)(Arguments...), const LaunchSize& size,
                        cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = static_cast<unsigned>(size.cluster);
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(size.grid));
  config.blockDim = dim3(static_cast<unsigned>(size.threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(size.shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = size.cluster > 1 ? 2 : 1;
  return cuda_status(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

}  // namespace sinkattn::hopper
