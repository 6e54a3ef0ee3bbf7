// SPDX-License-Identifier: Apache-2.0
// The oracle: attention in double precision, straight from the formulas of docs/math.md, one row
// (or one key) at a time. It serves float64 tensors and is what every kernel is tested against.
#pragma once

#include <cstddef>

#include "common/problem.h"
#include "sinkattn/attention.h"

namespace sinkattn::cpu::reference {

void forward(const ForwardProblem& problem, const ExecutionContext& context);

/// Workspace of backward(): D' of every row.
std::size_t backward_workspace(const BackwardProblem& problem);
void backward(const BackwardProblem& problem, const ExecutionContext& context);

}  // namespace sinkattn::cpu::reference
