// SPDX-License-Identifier: Apache-2.0
// The backward on Hopper: prepare, main pass, finish.
#include <algorithm>
#include <cstdio>
#include <limits>

#include "common/backend.h"
#include "hopper/backward_tuning.h"
#include "hopper/core/tensor_map.h"
#include "hopper/device.h"
#include "hopper/kernels/backward.h"
#include "hopper/kernels/backward_finish.h"
#include "hopper/kernels/backward_launch.h"
#include "hopper/kernels/prepare.h"

namespace sinkattn::hopper {
namespace {

constexpr double log2e = 1.4426950408889634;

/// One compiled pair of head dims.
struct Instance {
  CompiledDims dims;
  Status (*key_pass)(const BackwardArguments&, DType, unsigned, cudaStream_t);
};

constexpr Instance instances[] = {
    {{64, 64}, launch_key_pass_64},
    {{96, 96}, launch_key_pass_96},
    {{128, 128}, launch_key_pass_128},
};

const Instance* find_instance(const BackwardProblem& problem) {
  for (const Instance& instance : instances) {
    if (problem.head_dim <= instance.dims.d && problem.head_dim_v <= instance.dims.dv) {
      return &instance;
    }
  }
  return nullptr;
}

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// Parts that the query heads of a group are split into, so that there are blocks for every
/// multiprocessor. 1 where the blocks suffice: then dK and dV are stored once, from registers.
int group_splits(const BackwardProblem& problem, int sm_count) {
  const std::int64_t rows = problem.packed_k ? problem.rows_k : problem.batch * problem.rows_k;
  const std::int64_t blocks = ceil_div(rows, key_pass_keys) * problem.heads_kv;
  const std::int64_t wanted = 2 * std::max(1, sm_count);
  if (problem.group == 1 || blocks >= wanted * 3 / 4 || blocks == 0) return 1;
  const std::int64_t splits = std::min(problem.group, ceil_div(wanted, blocks));
  return static_cast<int>(ceil_div(problem.group, ceil_div(problem.group, splits)));
}

/// The workspace behind the plan; the number of splits is in the plan.
struct Workspace {
  PrepareLayout prepare;
  std::size_t dq_offset, dk_offset, dv_offset, bytes;

  Workspace(const BackwardProblem& problem, CompiledDims dims, int splits) : prepare(problem) {
    const auto aligned = [](std::int64_t n) { return static_cast<std::size_t>(ceil_div(n, 256)) * 256; };
    const std::int64_t batch_q = problem.packed_q ? 1 : problem.batch;
    const std::int64_t batch_k = problem.packed_k ? 1 : problem.batch;
    const std::int64_t keys =
        splits > 1 && problem.dk.data != nullptr ? splits * batch_k * problem.rows_k * problem.heads_kv : 0;
    const bool with_dq = problem.dq.data != nullptr;
    dq_offset = prepare.bytes;
    dk_offset = dq_offset +
                aligned(with_dq ? 4 * batch_q * problem.heads_q * prepare.rows * dims.d : 0);
    dv_offset = dk_offset + aligned(4 * keys * dims.d);
    bytes = dv_offset + aligned(4 * keys * dims.dv);
  }
};

Status make_maps(const BackwardProblem& problem, BackwardArguments* p) {
  const std::int64_t batch_q = problem.packed_q ? 1 : problem.batch;
  const std::int64_t batch_k = problem.packed_k ? 1 : problem.batch;
  const auto map = [&](const HeadsTensor& tensor, std::int64_t columns, bool queries, int box,
                       CUtensorMap* result) {
    return make_tensor_map(
        tensor_map_key(tensor, columns, queries ? problem.rows_q : problem.rows_k,
                       queries ? problem.heads_q : problem.heads_kv, queries ? batch_q : batch_k,
                       box),
        result);
  };
  SINKATTN_RETURN_IF_ERROR(
      map(problem.query, problem.head_dim, true, backward_tile_queries, &p->query));
  if (problem.dout.data != nullptr) {
    SINKATTN_RETURN_IF_ERROR(
        map(problem.dout, problem.head_dim_v, true, backward_tile_queries, &p->dout));
  }
  SINKATTN_RETURN_IF_ERROR(map(problem.key, problem.head_dim, false, key_pass_keys, &p->key));
  return map(problem.value, problem.head_dim_v, false, key_pass_keys, &p->value);
}

BackwardArguments make_arguments(const BackwardProblem& problem) {
  BackwardArguments p{};
  p.dq = problem.dq;
  p.dk = problem.dk;
  p.dv = problem.dv;
  p.side_q = problem.side_q;
  p.side_k = problem.side_k;
  p.mask = problem.mask;
  p.rows_q = problem.rows_q;
  p.rows_k = problem.rows_k;
  p.softmax_scale = static_cast<float>(problem.softmax_scale);
  const bool capped = problem.softcap != 0.0;
  p.score_scale = static_cast<float>(problem.softmax_scale * (capped ? 1.0 / problem.softcap : log2e));
  p.score_cap = static_cast<float>(problem.softcap * log2e);
  p.heads_q = static_cast<int>(problem.heads_q);
  p.heads_kv = static_cast<int>(problem.heads_kv);
  p.group = static_cast<int>(problem.group);
  p.head_dim = static_cast<int>(problem.head_dim);
  p.head_dim_v = static_cast<int>(problem.head_dim_v);
  p.batch = static_cast<int>(problem.batch);
  p.packed_q = problem.packed_q;
  p.packed_k = problem.packed_k;
  p.has_dout = problem.dout.data != nullptr;
  return p;
}

/// Pairs that run together: their Q, dO and accumulator of one head should stay in L2.
int pairs_per_section(const BackwardProblem& problem, CompiledDims dims) {
  constexpr std::int64_t budget = 24 << 20;
  const std::int64_t bytes = problem.longest_q * (2 * (dims.d + dims.dv) + 4 * dims.d);
  return static_cast<int>(std::clamp<std::int64_t>(budget / std::max<std::int64_t>(bytes, 1), 1, 4096));
}

Status launch_keys(const BackwardProblem& problem, const Instance& instance,
                   BackwardArguments& p, cudaStream_t stream) {
  p.tiles = static_cast<int>(ceil_div(problem.longest_k, key_pass_keys));
  p.section = pairs_per_section(problem, instance.dims);
  const std::int64_t grid =
      static_cast<std::int64_t>(p.tiles) * p.batch * p.heads_kv * p.splits;
  if (grid > std::numeric_limits<std::int32_t>::max()) {
    return Status::error(StatusCode::not_implemented,
                         "k: expected fewer than 2^31 tiles of 128 keys, got more");
  }
  if (grid == 0) return {};
  return instance.key_pass(p, problem.query.dtype, static_cast<unsigned>(grid), stream);
}

/// Everything but the prepare pass.
Status launch_main(const BackwardProblem& problem, const Instance& instance, int splits,
                   const Workspace& layout, char* memory, cudaStream_t stream) {
  BackwardArguments p = make_arguments(problem);
  const auto floats = [&](std::size_t offset) { return reinterpret_cast<float*>(memory + offset); };
  p.lse2 = floats(layout.prepare.lse2_offset);
  p.softmax_d = floats(layout.prepare.d_offset);
  p.statistic_rows = layout.prepare.rows;
  p.dq_accumulator = problem.dq.data != nullptr ? floats(layout.dq_offset) : nullptr;
  p.splits = splits;
  p.heads_per_split = static_cast<int>(ceil_div(problem.group, splits));
  if (splits > 1 && problem.dk.data != nullptr) {
    p.dk_partial = floats(layout.dk_offset);
    p.dv_partial = floats(layout.dv_offset);
    p.partial_stride = (problem.packed_k ? 1 : problem.batch) * problem.rows_k * problem.heads_kv;
  }
  const bool tokens = problem.rows_q > 0 && problem.rows_k > 0 && problem.batch > 0;
  if (tokens) {
    SINKATTN_RETURN_IF_ERROR(make_maps(problem, &p));
    SINKATTN_RETURN_IF_ERROR(launch_keys(problem, instance, p, stream));
  }
  const DType dtype = problem.query.dtype;
  if (p.dq_accumulator != nullptr) {
    SINKATTN_RETURN_IF_ERROR(launch_finish_queries(
        p, dtype, instance.dims.d, ceil_div(problem.longest_q, backward_tile_queries), stream));
  }
  if (p.dk_partial != nullptr && tokens) {
    SINKATTN_RETURN_IF_ERROR(
        launch_finish_keys(p, dtype, instance.dims, problem.longest_k, stream));
  }
  const auto zero_unused = [&](const HeadsTensor& gradient, bool queries, std::int64_t columns) {
    return launch_zero_unused(gradient, queries ? problem.side_q : problem.side_k,
                              queries ? problem.packed_q : problem.packed_k, p.batch,
                              queries ? p.heads_q : p.heads_kv, static_cast<int>(columns),
                              !queries && !tokens, stream);
  };
  SINKATTN_RETURN_IF_ERROR(zero_unused(problem.dq, true, problem.head_dim));
  SINKATTN_RETURN_IF_ERROR(zero_unused(problem.dk, false, problem.head_dim));
  return zero_unused(problem.dv, false, problem.head_dim_v);
}

bool wants_main_pass(const BackwardProblem& problem) {
  return problem.dq.data != nullptr || problem.dk.data != nullptr;
}

}  // namespace

Status plan_backward(const BackwardProblem& problem, const DeviceProperties& device, Plan* plan) {
  plan->backend = Backend::hopper;
  if (!wants_main_pass(problem)) {
    plan->tile_m = static_cast<int>(prepare_tile_rows);
    plan->workspace_bytes = PrepareLayout(problem).bytes;
    std::snprintf(plan->kernel, sizeof(plan->kernel), "prepare_%s", dtype_name(problem.out.dtype));
    std::snprintf(plan->reason, sizeof(plan->reason),
                  "only D' and dsink are wanted: the prepare pass alone");
    return {};
  }
  const Instance* instance = find_instance(problem);
  if (instance == nullptr) return not_built("q", "the backward for head dims above 128");
  plan->num_splits = group_splits(problem, device.sm_count);
  plan->tile_m = backward_tile_queries;
  plan->tile_n = key_pass_keys;
  plan->workspace_bytes = Workspace(problem, instance->dims, plan->num_splits).bytes;
  std::snprintf(plan->kernel, sizeof(plan->kernel), "backward_keys_%s_d%d_dv%d%s",
                dtype_name(problem.query.dtype), instance->dims.d, instance->dims.dv,
                problem.softcap != 0.0 ? "_softcap" : "");
  std::snprintf(plan->reason, sizeof(plan->reason),
                "blocks of %d keys loop over query heads, the group in %d part(s)", key_pass_keys,
                plan->num_splits);
  return {};
}

Status backward(const BackwardProblem& problem, const Plan& plan,
                const ExecutionContext& context) {
  const cudaStream_t stream = stream_of(context);
  if (!wants_main_pass(problem)) return launch_prepare(problem, context.workspace, {}, stream);
  const Instance* instance = find_instance(problem);
  if (instance == nullptr) return not_built("q", "the backward for head dims above 128");
  const Workspace layout(problem, instance->dims, plan.num_splits);
  char* memory = static_cast<char*>(context.workspace);
  PrepareAccumulator accumulator;
  if (problem.dq.data != nullptr) {
    accumulator = {reinterpret_cast<float*>(memory + layout.dq_offset), instance->dims.d};
  }
  SINKATTN_RETURN_IF_ERROR(launch_prepare(problem, memory, accumulator, stream));
  return launch_main(problem, *instance, plan.num_splits, layout, memory, stream);
}

}  // namespace sinkattn::hopper
