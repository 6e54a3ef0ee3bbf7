// SPDX-License-Identifier: Apache-2.0
// CUDA errors as Status, and the facts of a device, read once.
#pragma once

#include <cuda_runtime_api.h>

#include "sinkattn/attention.h"
#include "sinkattn/plan.h"
#include "sinkattn/status.h"

namespace sinkattn::hopper {

/// `what` names the call that failed.
Status cuda_status(cudaError_t error, const char* what);

/// Status of the launch that was just made on this thread.
Status launch_status(const char* kernel);

inline cudaStream_t stream_of(const ExecutionContext& context) {
  return static_cast<cudaStream_t>(context.stream);
}

}  // namespace sinkattn::hopper
