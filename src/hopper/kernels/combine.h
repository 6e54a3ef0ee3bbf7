// SPDX-License-Identifier: Apache-2.0
// Merging partial results (split-KV, context parallelism); the sink enters once.
#pragma once

#include <cuda_runtime_api.h>

#include "common/problem.h"
#include "sinkattn/status.h"

namespace sinkattn::hopper {

/// Launches the merge of `problem` on `stream`.
Status launch_combine(const CombineProblem& problem, cudaStream_t stream);

}  // namespace sinkattn::hopper
