// SPDX-License-Identifier: Apache-2.0
// The public operations: check, pick the backend by device, plan or run. Nothing may throw past
// here.
#include <algorithm>
#include <cstdint>
#include <exception>

#include "common/backend.h"
#include "common/check.h"
#include "common/prepared.h"
#include "sinkattn/attention.h"

namespace sinkattn {
namespace {

constexpr std::size_t workspace_alignment = 256;

/// Turns exceptions of the standard library (out of memory, thread creation) into a Status.
template <class Function>
Status guarded(Function&& function) noexcept {
  try {
    return function();
  } catch (const std::exception& error) {
    return Status::error(StatusCode::runtime_error, "sinkattn: expected no failure, got %s",
                         error.what());
  } catch (...) {
    return Status::error(StatusCode::runtime_error,
                         "sinkattn: expected no failure, got an unknown exception");
  }
}

Status check_device(DeviceType type, const DeviceProperties& device) {
  if (device.device.type != type) {
    return Status::error(StatusCode::value_error,
                         "device: expected the properties of the device of q, got another type");
  }
  if (type == DeviceType::cpu) return {};
  if (!built_with_cuda()) {
    return Status::error(StatusCode::not_implemented,
                         "q: expected a CPU tensor (this build has no CUDA kernels), got a CUDA "
                         "tensor");
  }
  if (device.compute_capability != 90) {
    return Status::error(StatusCode::runtime_error,
                         "q: expected a GPU of compute capability 9.0 (Hopper), got %d.%d",
                         device.compute_capability / 10, device.compute_capability % 10);
  }
  return {};
}

Status check_workspace(const Plan& plan, const ExecutionContext& context) {
  if (plan.workspace_bytes == 0) return {};
  if (context.workspace == nullptr || context.workspace_bytes < plan.workspace_bytes) {
    return Status::error(StatusCode::runtime_error, "workspace: expected %zu bytes, got %zu",
                         plan.workspace_bytes,
                         context.workspace == nullptr ? std::size_t{0} : context.workspace_bytes);
  }
  if (reinterpret_cast<std::uintptr_t>(context.workspace) % workspace_alignment != 0) {
    return Status::error(StatusCode::value_error,
                         "workspace: expected an address aligned to %zu bytes, got another",
                         workspace_alignment);
  }
  return {};
}

Status check_backend(const Plan& plan, DeviceType type) {
  const Backend expected = type == DeviceType::cpu ? Backend::cpu : Backend::hopper;
  if (plan.backend == expected) return {};
  return Status::error(StatusCode::value_error,
                       "plan: expected a plan for the device of q, got one for another");
}

#if SINKATTN_WITH_CUDA
#define SINKATTN_PLAN(operation, problem, device, plan)                \
  ((problem).device == DeviceType::cpu ? cpu::operation(problem, plan) \
                                       : hopper::operation(problem, device, plan))
#define SINKATTN_RUN(operation, problem, plan, context)                         \
  ((problem).device == DeviceType::cpu ? cpu::operation(problem, plan, context) \
                                       : hopper::operation(problem, plan, context))
#else
#define SINKATTN_PLAN(operation, problem, device, plan) cpu::operation(problem, plan)
#define SINKATTN_RUN(operation, problem, plan, context) cpu::operation(problem, plan, context)
#endif

// One pair of entry points per operation; they differ in types and names alone.
#define SINKATTN_DEFINE_OPERATION(operation, Params, Problem, make_problem)                   \
  Status plan_##operation(const Params& params, const DeviceProperties& device, Plan* plan) { \
    return guarded([&]() -> Status {                                                          \
      Problem problem;                                                                        \
      SINKATTN_RETURN_IF_ERROR(make_problem(params, &problem));                               \
      SINKATTN_RETURN_IF_ERROR(check_device(problem.device, device));                         \
      *plan = {};                                                                             \
      return SINKATTN_PLAN(plan_##operation, problem, device, plan);                          \
    });                                                                                       \
  }                                                                                           \
  Status operation(const Params& params, const Plan& plan, const ExecutionContext& context) { \
    return guarded([&]() -> Status {                                                          \
      Problem problem;                                                                        \
      SINKATTN_RETURN_IF_ERROR(make_problem(params, &problem));                               \
      SINKATTN_RETURN_IF_ERROR(check_backend(plan, problem.device));                          \
      SINKATTN_RETURN_IF_ERROR(check_workspace(plan, context));                               \
      return SINKATTN_RUN(operation, problem, plan, context);                                 \
    });                                                                                       \
  }

// The same two steps for callers inside the library, which hand the problem on; see prepared.h.
#define SINKATTN_DEFINE_PREPARED(operation, Params, Problem, make_problem)                  \
  Status prepare_##operation(const Params& params, const DeviceProperties& device,          \
                             Prepared<Problem>* prepared) {                                 \
    return guarded([&]() -> Status {                                                        \
      Problem& problem = prepared->problem;                                                 \
      SINKATTN_RETURN_IF_ERROR(make_problem(params, &problem));                             \
      SINKATTN_RETURN_IF_ERROR(check_device(problem.device, device));                       \
      problem.describe = false;                                                             \
      return SINKATTN_PLAN(plan_##operation, problem, device, &prepared->plan);             \
    });                                                                                     \
  }                                                                                         \
  Status run_prepared(const Prepared<Problem>& prepared, const ExecutionContext& context) { \
    return guarded([&]() -> Status {                                                        \
      SINKATTN_RETURN_IF_ERROR(check_workspace(prepared.plan, context));                    \
      return SINKATTN_RUN(operation, prepared.problem, prepared.plan, context);             \
    });                                                                                     \
  }

}  // namespace

SINKATTN_DEFINE_OPERATION(forward, ForwardParams, ForwardProblem, make_forward_problem)
SINKATTN_DEFINE_OPERATION(backward, BackwardParams, BackwardProblem, make_backward_problem)
SINKATTN_DEFINE_OPERATION(append_kv, AppendParams, AppendProblem, make_append_problem)
SINKATTN_DEFINE_OPERATION(combine, CombineParams, CombineProblem, make_combine_problem)

SINKATTN_DEFINE_PREPARED(forward, ForwardParams, ForwardProblem, make_forward_problem)
SINKATTN_DEFINE_PREPARED(backward, BackwardParams, BackwardProblem, make_backward_problem)

std::int64_t schedule_length(std::int64_t batch_size) {
  // One word per sequence, padded like the buffers that serving engines pre-allocate, plus a
  // header.
  return (batch_size + 3) / 4 * 4 + 1;
}

Status plan_schedule(const ScheduleParams& params, const DeviceProperties& device, Plan* plan) {
  SINKATTN_RETURN_IF_ERROR(check_schedule(params));
  SINKATTN_RETURN_IF_ERROR(check_device(params.cache_seqlens.device.type, device));
  *plan = {};
#if SINKATTN_WITH_CUDA
  if (device.device.type == DeviceType::cuda) {
    return guarded([&]() { return hopper::plan_schedule(params, device, plan); });
  }
#endif
  std::snprintf(plan->kernel, sizeof(plan->kernel), "cpu_schedule");
  std::snprintf(plan->reason, sizeof(plan->reason), "one word per sequence: its number of splits");
  return {};
}

Status schedule(const ScheduleParams& params, const Plan& plan, const ExecutionContext& context) {
  SINKATTN_RETURN_IF_ERROR(check_schedule(params));
  SINKATTN_RETURN_IF_ERROR(check_backend(plan, params.cache_seqlens.device.type));
#if SINKATTN_WITH_CUDA
  if (plan.backend == Backend::hopper) {
    return guarded([&]() { return hopper::schedule(params, plan, context); });
  }
#endif
  (void)context;
  // The CPU backend runs a sequence in one piece unless it is told a number of splits.
  std::int32_t* words = params.metadata.as<std::int32_t>();
  const std::int32_t splits = params.num_splits > 0 ? params.num_splits : 1;
  std::fill(words, words + schedule_length(params.batch_size), splits);
  words[0] = static_cast<std::int32_t>(params.batch_size);
  return {};
}

Status query_device(Device device, DeviceProperties* properties) {
  return guarded([&]() -> Status {
    *properties = {};
    properties->device = device;
    if (device.type == DeviceType::cpu) return {};
#if SINKATTN_WITH_CUDA
    return hopper::query_device(device.index, properties);
#else
    return {};  // check_device() says what this build lacks
#endif
  });
}

const char* version() { return SINKATTN_VERSION; }

bool built_with_cuda() { return SINKATTN_WITH_CUDA != 0; }

}  // namespace sinkattn
