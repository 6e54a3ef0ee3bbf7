// SPDX-License-Identifier: Apache-2.0
// The operations of sinkattn: exact attention with a learnable sink, forward and backward.
//
// Every operation is plan -> execute:
//     Plan plan;
//     Status s = plan_forward(params, device_properties, &plan);     // all argument checks happen
//     here
//     ... allocate plan.workspace_bytes on the device ...
//     s = forward(params, plan, context);                            // checks again, then launches
// Execution allocates nothing, throws nothing, never synchronises with the host, is safe under
// CUDA-graph capture and from any number of threads. Outputs are written completely: rows outside
// the used range are 0 (LSE -inf). Mathematics and edge cases: docs/math.md.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sinkattn/params.h"
#include "sinkattn/plan.h"
#include "sinkattn/status.h"

namespace sinkattn {

/// Runs `body(body_context, begin, end)` over a partition of [0, n), possibly in parallel.
using ParallelFor = void (*)(void* executor_context, std::int64_t n,
                             void (*body)(void* body_context, std::int64_t begin, std::int64_t end),
                             void* body_context);

/// Where and with what an operation runs.
struct ExecutionContext {
  void* workspace = nullptr;  ///< plan.workspace_bytes bytes on the device of the tensors
  std::size_t workspace_bytes = 0;
  void* stream = nullptr;              ///< CUDA: cudaStream_t
  ParallelFor parallel_for = nullptr;  ///< CPU: thread pool of the host program; null: own threads
  void* executor_context = nullptr;    ///< first argument of parallel_for
};

/// Fills `properties` for a device of this machine (cached; thread-safe).
SINKATTN_API Status query_device(Device device, DeviceProperties* properties);

SINKATTN_API Status plan_forward(const ForwardParams& params, const DeviceProperties& device,
                                 Plan* plan);
SINKATTN_API Status forward(const ForwardParams& params, const Plan& plan,
                            const ExecutionContext& context);

SINKATTN_API Status plan_backward(const BackwardParams& params, const DeviceProperties& device,
                                  Plan* plan);
SINKATTN_API Status backward(const BackwardParams& params, const Plan& plan,
                             const ExecutionContext& context);

SINKATTN_API Status plan_append_kv(const AppendParams& params, const DeviceProperties& device,
                                   Plan* plan);
SINKATTN_API Status append_kv(const AppendParams& params, const Plan& plan,
                              const ExecutionContext& context);

SINKATTN_API Status plan_combine(const CombineParams& params, const DeviceProperties& device,
                                 Plan* plan);
SINKATTN_API Status combine(const CombineParams& params, const Plan& plan,
                            const ExecutionContext& context);

/// Elements of the metadata vector for a batch; depends on the batch size alone and is at most
/// 4 * round_up(batch_size, 4) + 1.
SINKATTN_API std::int64_t schedule_length(std::int64_t batch_size);
SINKATTN_API Status plan_schedule(const ScheduleParams& params, const DeviceProperties& device,
                                  Plan* plan);
SINKATTN_API Status schedule(const ScheduleParams& params, const Plan& plan,
                             const ExecutionContext& context);

/// Version of the library, "major.minor.patch", and 1 if it was built with the Hopper kernels.
SINKATTN_API const char* version();
SINKATTN_API bool built_with_cuda();

}  // namespace sinkattn
