// SPDX-License-Identifier: Apache-2.0
// The KV cache on Hopper: append, decode, combine.
#include <cstdio>

#include "common/backend.h"
#include "hopper/device.h"
#include "hopper/kernels/combine.h"

namespace sinkattn::hopper {

Status plan_append_kv(const AppendProblem&, const DeviceProperties&, Plan*) {
  return not_built("k_cache", "appending to a cache");
}

Status append_kv(const AppendProblem&, const Plan&, const ExecutionContext&) {
  return not_built("k_cache", "appending to a cache");
}

Status plan_combine(const CombineProblem&, const DeviceProperties&, Plan* plan) {
  plan->backend = Backend::hopper;
  std::snprintf(plan->kernel, sizeof(plan->kernel), "combine");
  std::snprintf(plan->reason, sizeof(plan->reason), "one warp per row and head, fp32");
  return {};
}

Status combine(const CombineProblem& problem, const Plan&, const ExecutionContext& context) {
  return launch_combine(problem, stream_of(context));
}

}  // namespace sinkattn::hopper
