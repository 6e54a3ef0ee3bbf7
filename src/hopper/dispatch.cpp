// SPDX-License-Identifier: Apache-2.0
// What the Hopper backend serves today. Everything else says so and names what works.
#include <cstdio>

#include "common/backend.h"
#include "hopper/device.h"
#include "hopper/kernels/combine.h"
#include "hopper/kernels/prepare.h"

namespace sinkattn::hopper {
namespace {

Status not_built(const char* argument, const char* what) {
  return Status::error(
      StatusCode::not_implemented,
      "%s: expected a CPU tensor (%s has no CUDA kernel yet; on CUDA only the "
      "backward's prepare pass, dsink and softmax_d, and combine are built), got a CUDA "
      "tensor",
      argument, what);
}

cudaStream_t stream_of(const ExecutionContext& context) {
  return static_cast<cudaStream_t>(context.stream);
}

}  // namespace

Status plan_forward(const ForwardProblem&, const DeviceProperties&, Plan*) {
  return not_built("q", "the forward");
}

Status forward(const ForwardProblem&, const Plan&, const ExecutionContext&) {
  return not_built("q", "the forward");
}

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
