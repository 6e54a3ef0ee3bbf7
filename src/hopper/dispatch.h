// SPDX-License-Identifier: Apache-2.0
// Which kernel family serves a forward problem.
#pragma once

#include "common/problem.h"
#include "hopper/device.h"

namespace sinkattn::hopper {

/// True for the problems that the decode kernel is made for: few packed query rows. It is correct,
/// if slow, for long ones as well (decode_can_serve).
bool decode_serves(const ForwardProblem& problem);

/// True if the decode kernel gives the right result, whatever the speed.
bool decode_can_serve(const ForwardProblem& problem);

Status plan_decode(const ForwardProblem& problem, const DeviceProperties& device, Plan* plan);
Status run_decode(const ForwardProblem& problem, const Plan& plan, const ExecutionContext& context);

}  // namespace sinkattn::hopper
