// SPDX-License-Identifier: Apache-2.0
// The forward on Hopper: which kernel serves a problem, and with which tiles.
#include <cstdio>

#include "common/backend.h"
#include "hopper/device.h"

namespace sinkattn::hopper {

Status plan_forward(const ForwardProblem&, const DeviceProperties&, Plan*) {
  return not_built("q", "the forward");
}

Status forward(const ForwardProblem&, const Plan&, const ExecutionContext&) {
  return not_built("q", "the forward");
}

}  // namespace sinkattn::hopper
