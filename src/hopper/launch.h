// SPDX-License-Identifier: Apache-2.0
// Launching kernels that use more shared memory than the default limit.
#pragma once

#include <cuda_runtime_api.h>

#include "sinkattn/status.h"

namespace sinkattn::hopper {

struct LaunchShape {
  unsigned grid = 1;
  unsigned block = 1;
  int shared_bytes = 0;
};

/// Launches `kernel` with one by-value argument. Raises the kernel's shared-memory limit the first
/// time it runs on a device.
Status launch_kernel(const void* kernel, const char* name, const LaunchShape& shape, void* argument,
                     cudaStream_t stream);

}  // namespace sinkattn::hopper
