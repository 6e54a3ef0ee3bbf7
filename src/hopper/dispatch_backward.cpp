// SPDX-License-Identifier: Apache-2.0
// The backward on Hopper: prepare, main pass, finish.
#include <cstdio>

#include "common/backend.h"
#include "hopper/device.h"
#include "hopper/kernels/prepare.h"

namespace sinkattn::hopper {

Status plan_backward(const BackwardProblem& problem, const DeviceProperties&, Plan* plan) {
  if (problem.dq.data != nullptr || problem.dk.data != nullptr) {
    return not_built("q", "the backward's main pass");
  }
  plan->backend = Backend::hopper;
  plan->tile_m = static_cast<int>(prepare_tile_rows);
  plan->workspace_bytes = PrepareLayout(problem).bytes;
  std::snprintf(plan->kernel, sizeof(plan->kernel), "prepare_%s", dtype_name(problem.out.dtype));
  std::snprintf(plan->reason, sizeof(plan->reason),
                "only D' and dsink are wanted: the prepare pass alone");
  return {};
}

Status backward(const BackwardProblem& problem, const Plan&, const ExecutionContext& context) {
  return launch_prepare(problem, context.workspace, stream_of(context));
}

}  // namespace sinkattn::hopper
