// SPDX-License-Identifier: Apache-2.0
// Appending to a KV cache: new keys and values go to their slots, keys and queries are rotated.
#pragma once

#include <cuda_runtime_api.h>

#include "common/problem.h"
#include "sinkattn/status.h"

namespace sinkattn::hopper {

/// Launches the append of `problem` on `stream`; no workspace.
Status launch_append(const AppendProblem& problem, cudaStream_t stream);

}  // namespace sinkattn::hopper
