// SPDX-License-Identifier: Apache-2.0
// What a backend provides. api.cpp checks the params, picks the backend by device and calls these.
// plan_* fills every field of the Plan; run functions may rely on the plan coming from plan_* with
// the same problem and on the workspace being large enough (api.cpp verifies both).
#pragma once

#include "common/problem.h"
#include "sinkattn/attention.h"

namespace sinkattn {

namespace cpu {
Status plan_forward(const ForwardProblem& problem, Plan* plan);
Status forward(const ForwardProblem& problem, const Plan& plan, const ExecutionContext& context);
Status plan_backward(const BackwardProblem& problem, Plan* plan);
Status backward(const BackwardProblem& problem, const Plan& plan, const ExecutionContext& context);
Status plan_append_kv(const AppendProblem& problem, Plan* plan);
Status append_kv(const AppendProblem& problem, const Plan& plan, const ExecutionContext& context);
Status plan_combine(const CombineProblem& problem, Plan* plan);
Status combine(const CombineProblem& problem, const Plan& plan, const ExecutionContext& context);
}  // namespace cpu

// Implemented in src/hopper when built with CUDA. A problem that no kernel serves yet gets
// StatusCode::not_implemented from plan_* with the nearest request that works.
namespace hopper {
Status query_device(int index, DeviceProperties* properties);
Status plan_forward(const ForwardProblem& problem, const DeviceProperties& device, Plan* plan);
Status forward(const ForwardProblem& problem, const Plan& plan, const ExecutionContext& context);
Status plan_backward(const BackwardProblem& problem, const DeviceProperties& device, Plan* plan);
Status backward(const BackwardProblem& problem, const Plan& plan, const ExecutionContext& context);
Status plan_append_kv(const AppendProblem& problem, const DeviceProperties& device, Plan* plan);
Status append_kv(const AppendProblem& problem, const Plan& plan, const ExecutionContext& context);
Status plan_schedule(const ScheduleParams& params, const DeviceProperties& device, Plan* plan);
Status schedule(const ScheduleParams& params, const Plan& plan, const ExecutionContext& context);
Status plan_combine(const CombineProblem& problem, const DeviceProperties& device, Plan* plan);
Status combine(const CombineProblem& problem, const Plan& plan, const ExecutionContext& context);
}  // namespace hopper

}  // namespace sinkattn
