// SPDX-License-Identifier: Apache-2.0
// The KV cache on Hopper: append, decode, schedule, combine.
#include <cstdio>

#include "common/backend.h"
#include "hopper/decode_tuning.h"
#include "hopper/device.h"
#include "hopper/dispatch.h"
#include "hopper/kernels/append.h"
#include "hopper/kernels/combine.h"
#include "hopper/kernels/decode.h"
#include "hopper/kernels/schedule.h"

namespace sinkattn::hopper {
namespace {

bool sixteen_bit(DType type) { return type == DType::bfloat16 || type == DType::float16; }

}  // namespace

bool decode_can_serve(const ForwardProblem& p) {
  return sixteen_bit(p.query.dtype) && p.query_v.data == nullptr && p.head_dim_v <= 256;
}

bool decode_serves(const ForwardProblem& p) {
  return decode_can_serve(p) && p.longest_q <= decode_positions(p.head_dim) &&
         p.longest_q * p.group <= decode_rows;
}

Status plan_decode(const ForwardProblem& p, const DeviceProperties& device, Plan* plan) {
  DecodeLaunch launch;
  SINKATTN_RETURN_IF_ERROR(make_decode_launch(p, device.sm_count, &launch));
  plan->backend = Backend::hopper;
  plan->num_splits = launch.splits;
  plan->pack_gqa = true;
  plan->tile_m = launch.rows;
  plan->tile_n = launch.tile_keys;
  plan->grid = launch.grid;
  plan->workspace_bytes = launch.bytes;
  if (!p.describe) return {};
  std::snprintf(plan->kernel, sizeof(plan->kernel), "decode_%d_%d_%s", launch.columns,
                launch.columns_v, dtype_name(p.query.dtype));
  std::snprintf(plan->reason, sizeof(plan->reason), "%lld packed query rows per KV head, %s",
                static_cast<long long>(p.longest_q * p.group),
                launch.splits == 0   ? "keys shared out evenly over all blocks"
                : launch.splits == 1 ? "keys of a row tile in one block"
                                     : "keys of a row tile in equal pieces");
  return {};
}

Status run_decode(const ForwardProblem& p, const Plan& plan, const ExecutionContext& context) {
  DecodeLaunch launch;
  SINKATTN_RETURN_IF_ERROR(restore_decode_launch(p, plan, &launch));
  return launch_decode(p, launch, context.workspace, stream_of(context));
}

Status plan_append_kv(const AppendProblem& p, const DeviceProperties&, Plan* plan) {
  if (!sixteen_bit(p.cache.key.dtype)) {
    return Status::error(StatusCode::not_implemented,
                         "k_cache: expected bfloat16 or float16 on CUDA, got %s",
                         dtype_name(p.cache.key.dtype));
  }
  plan->backend = Backend::hopper;
  std::snprintf(plan->kernel, sizeof(plan->kernel), "append_%s", dtype_name(p.cache.key.dtype));
  std::snprintf(plan->reason, sizeof(plan->reason), "%s",
                p.rotary_dim > 0 ? "rotates keys and queries" : "copies");
  return {};
}

Status append_kv(const AppendProblem& p, const Plan&, const ExecutionContext& context) {
  return launch_append(p, stream_of(context));
}

Status plan_schedule(const ScheduleParams&, const DeviceProperties& device, Plan* plan) {
  plan->backend = Backend::hopper;
  plan->grid = device.sm_count;
  std::snprintf(plan->kernel, sizeof(plan->kernel), "schedule");
  std::snprintf(plan->reason, sizeof(plan->reason),
                "one word per sequence: its number of pieces per row tile and KV head");
  return {};
}

Status schedule(const ScheduleParams& params, const Plan& plan, const ExecutionContext& context) {
  return launch_schedule(params, plan.grid, stream_of(context));
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
