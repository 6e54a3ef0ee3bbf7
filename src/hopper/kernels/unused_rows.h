// SPDX-License-Identifier: Apache-2.0
// Output rows that belong to no used token: 0, LSE -inf.
#pragma once

#include <cuda_runtime_api.h>

#include "common/problem.h"
#include "sinkattn/status.h"

namespace sinkattn::hopper {

/// Clears the rows of `out` and `lse` that no sequence of `problem` uses. Needed after a merge of
/// splits alone: the forward kernel itself writes these rows, the merge takes them for rows whose
/// keys are all invisible.
Status launch_clear_unused_rows(const ForwardProblem& problem, cudaStream_t stream);

}  // namespace sinkattn::hopper
