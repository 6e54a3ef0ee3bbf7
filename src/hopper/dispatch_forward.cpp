// SPDX-License-Identifier: Apache-2.0
// The forward on Hopper: which kernel serves a problem, and with which tiles.
#include "common/backend.h"
#include "hopper/device.h"
#include "hopper/dispatch.h"

namespace sinkattn::hopper {

Status plan_forward(const ForwardProblem& problem, const DeviceProperties& device, Plan* plan) {
  if (decode_can_serve(problem)) return plan_decode(problem, device, plan);
  return not_built("q", "the forward");
}

Status forward(const ForwardProblem& problem, const Plan& plan, const ExecutionContext& context) {
  return run_decode(problem, plan, context);
}

}  // namespace sinkattn::hopper
