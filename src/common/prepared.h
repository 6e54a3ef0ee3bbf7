// SPDX-License-Identifier: Apache-2.0
// Plan and run with one check of the arguments between them, for a caller that holds both ends of a
// call, as the torch operators do. The public plan -> execute pair must check twice: it cannot know
// that the params of the second call are those of the first.
#pragma once

#include "common/problem.h"
#include "sinkattn/attention.h"

namespace sinkattn {

/// A checked problem with its plan. The plan has no text: formatting it costs as much as making it.
template <class Problem>
struct Prepared {
  Problem problem;
  Plan plan;
};

Status prepare_forward(const ForwardParams& params, const DeviceProperties& device,
                       Prepared<ForwardProblem>* prepared);
Status run_prepared(const Prepared<ForwardProblem>& prepared, const ExecutionContext& context);

Status prepare_backward(const BackwardParams& params, const DeviceProperties& device,
                        Prepared<BackwardProblem>* prepared);
Status run_prepared(const Prepared<BackwardProblem>& prepared, const ExecutionContext& context);

}  // namespace sinkattn
