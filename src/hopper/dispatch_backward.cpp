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

/// Smallest first: a problem runs padded with zeros to the first pair that it fits into.
const BackwardInstance* const instances[] = {&backward_64_64, &backward_96_96, &backward_128_128,
                                             &backward_192_128, &backward_256_256};

const BackwardInstance* find_instance(const BackwardProblem& problem) {
  for (const BackwardInstance* instance : instances) {
    if (problem.head_dim <= instance->dims.d && problem.head_dim_v <= instance->dims.dv) {
      return instance;
    }
  }
  return nullptr;
}

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// Bytes of the accumulator, Q and dO of one query head of one sequence.
std::int64_t bytes_of_head(const BackwardProblem& problem, CompiledDims dims) {
  return std::max<std::int64_t>(1, problem.longest_q) * (2 * (dims.d + dims.dv) + 4 * dims.d);
}

/// dQ comes from the query pass where nothing may be added in undefined order and the key pass
/// cannot add in a fixed one, and where the key pass has nothing else to do; otherwise from the key
/// pass through the accumulator. In deterministic mode it does not depend on what else is wanted.
bool uses_query_pass(const BackwardProblem& problem, const BackwardInstance& instance) {
  if (problem.dq.data == nullptr) return false;
  return problem.deterministic ? !instance.adds_in_turn : problem.dk.data == nullptr;
}

bool uses_accumulator(const BackwardProblem& problem, const BackwardInstance& instance) {
  return problem.dq.data != nullptr && !uses_query_pass(problem, instance);
}

/// Parts that the query heads of a group are split into, for two reasons. Too few blocks for the
/// machine; and L2: under a mask blocks differ in length and drift apart over the heads they loop
/// over, and what all of them touch of the accumulator, Q and dO at one time should stay there. 1
/// otherwise: then dK and dV are stored once, from registers. 1 in deterministic mode: the order of
/// a sum must not depend on what else is in the batch.
int group_splits(const BackwardProblem& problem, const BackwardInstance& instance, int sm_count) {
  if (problem.dk.data == nullptr || problem.deterministic || problem.group == 1) return 1;
  const std::int64_t rows = problem.packed_k ? problem.rows_k : problem.batch * problem.rows_k;
  const std::int64_t blocks =
      std::max<std::int64_t>(1, ceil_div(rows, instance.key_pass_keys) * problem.heads_kv);
  const std::int64_t wanted = 2 * std::max(1, sm_count);
  std::int64_t splits = blocks >= wanted * 3 / 4 ? 1 : ceil_div(wanted, blocks);
  if (instance.splits_for_l2 && uses_accumulator(problem, instance) && !problem.mask.is_full()) {
    const std::int64_t heads =
        std::max<std::int64_t>(1, l2_of_heads / bytes_of_head(problem, instance.dims));
    splits = std::max(splits, ceil_div(problem.group, heads));
  }
  splits = std::min(splits, problem.group);
  return static_cast<int>(ceil_div(problem.group, ceil_div(problem.group, splits)));
}

/// The workspace behind the plan; the number of splits is in the plan.
struct Workspace {
  PrepareLayout prepare;
  std::size_t dq_offset, turns_offset, dk_offset, dv_offset, bytes;

  Workspace(const BackwardProblem& problem, const BackwardInstance& instance, int splits)
      : prepare(problem) {
    const CompiledDims dims = instance.dims;
    const auto aligned = [](std::int64_t n) {
      return static_cast<std::size_t>(ceil_div(n, 256)) * 256;
    };
    const std::int64_t batch_q = problem.packed_q ? 1 : problem.batch;
    const std::int64_t batch_k = problem.packed_k ? 1 : problem.batch;
    const std::int64_t keys = splits > 1 && problem.dk.data != nullptr
                                  ? splits * batch_k * problem.rows_k * problem.heads_kv
                                  : 0;
    const std::int64_t rows =
        uses_accumulator(problem, instance) ? batch_q * problem.heads_q * prepare.rows : 0;
    dq_offset = prepare.bytes;
    turns_offset = dq_offset + aligned(4 * rows * dims.d);
    dk_offset =
        turns_offset + aligned(problem.deterministic ? 4 * rows / backward_tile_queries : 0);
    dv_offset = dk_offset + aligned(4 * keys * dims.d);
    bytes = dv_offset + aligned(4 * keys * dims.dv);
  }
};

/// Tensor maps of a pass whose K and V come in boxes of `key_rows` rows.
Status make_maps(const BackwardProblem& problem, int key_rows, BackwardArguments* p) {
  const std::int64_t batch_q = problem.packed_q ? 1 : problem.batch;
  const std::int64_t batch_k = problem.packed_k ? 1 : problem.batch;
  const auto query_map = [&](const HeadsTensor& tensor, std::int64_t columns, CUtensorMap* map) {
    return make_tensor_map(tensor_map_key(tensor, columns, problem.rows_q, problem.heads_q, batch_q,
                                          backward_tile_queries),
                           map);
  };
  const auto key_map = [&](const HeadsTensor& tensor, std::int64_t columns, CUtensorMap* map) {
    return make_tensor_map(
        tensor_map_key(tensor, columns, problem.rows_k, problem.heads_kv, batch_k, key_rows), map);
  };
  SINKATTN_RETURN_IF_ERROR(query_map(problem.query, problem.head_dim, &p->query));
  if (problem.dout.data != nullptr) {
    SINKATTN_RETURN_IF_ERROR(query_map(problem.dout, problem.head_dim_v, &p->dout));
  }
  SINKATTN_RETURN_IF_ERROR(key_map(problem.key, problem.head_dim, &p->key));
  return key_map(problem.value, problem.head_dim_v, &p->value);
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
  p.score_scale =
      static_cast<float>(problem.softmax_scale * (capped ? 1.0 / problem.softcap : log2e));
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
  p.alternate = !problem.deterministic;
  return p;
}

/// Pairs that run together: their Q, dO and accumulator of one head should stay in L2.
int pairs_per_section(const BackwardProblem& problem, CompiledDims dims) {
  return static_cast<int>(
      std::clamp<std::int64_t>(l2_of_section / bytes_of_head(problem, dims), 1, 4096));
}

Status check_grid(std::int64_t grid, const char* tensor) {
  if (grid <= std::numeric_limits<std::int32_t>::max()) return {};
  return Status::error(StatusCode::not_implemented,
                       "%s: expected fewer than 2^31 tiles of 64 rows, got more", tensor);
}

Status launch_key_pass(const BackwardProblem& problem, const BackwardInstance& instance,
                       BackwardArguments& p, cudaStream_t stream) {
  SINKATTN_RETURN_IF_ERROR(make_maps(problem, instance.key_pass_keys, &p));
  const std::int64_t tiles = ceil_div(problem.longest_k, instance.key_pass_keys);
  const std::int64_t grid = tiles * p.batch * p.heads_kv * p.splits;
  SINKATTN_RETURN_IF_ERROR(check_grid(grid, "k"));
  p.tiles = static_cast<int>(tiles);
  p.section = pairs_per_section(problem, instance.dims);
  if (grid == 0) return {};
  return instance.key_pass(p, problem.query.dtype, static_cast<unsigned>(grid), stream);
}

Status launch_query_pass(const BackwardProblem& problem, const BackwardInstance& instance,
                         BackwardArguments& p, cudaStream_t stream) {
  SINKATTN_RETURN_IF_ERROR(make_maps(problem, instance.query_pass_keys, &p));
  const std::int64_t tiles = ceil_div(problem.longest_q, query_pass_queries);
  const std::int64_t grid = tiles * p.batch * p.heads_q;
  SINKATTN_RETURN_IF_ERROR(check_grid(grid, "q"));
  p.tiles = static_cast<int>(tiles);
  // The query heads of a group read the same K and V.
  p.section = static_cast<int>(std::max<std::int64_t>(16, problem.group));
  if (grid == 0) return {};
  return instance.query_pass(p, problem.query.dtype, static_cast<unsigned>(grid), stream);
}

/// Zeros what no kernel wrote: rows that belong to no sequence or lie past its used length; all of
/// dq, dk and dv where the other side has no tokens at all.
Status zero_unused(const BackwardProblem& problem, bool tokens, cudaStream_t stream) {
  const int batch = static_cast<int>(problem.batch);
  const int heads_q = static_cast<int>(problem.heads_q);
  const int heads_kv = static_cast<int>(problem.heads_kv);
  const int d = static_cast<int>(problem.head_dim);
  const int dv = static_cast<int>(problem.head_dim_v);
  SINKATTN_RETURN_IF_ERROR(launch_zero_unused(problem.dq, problem.side_q, problem.packed_q, batch,
                                              heads_q, d, !tokens, stream));
  SINKATTN_RETURN_IF_ERROR(launch_zero_unused(problem.dk, problem.side_k, problem.packed_k, batch,
                                              heads_kv, d, !tokens, stream));
  return launch_zero_unused(problem.dv, problem.side_k, problem.packed_k, batch, heads_kv, dv,
                            !tokens, stream);
}

/// Everything but the prepare pass.
Status launch_main(const BackwardProblem& problem, const BackwardInstance& instance, int splits,
                   const Workspace& layout, char* memory, cudaStream_t stream) {
  const bool tokens = problem.rows_q > 0 && problem.rows_k > 0 && problem.batch > 0;
  if (!tokens) return zero_unused(problem, false, stream);
  BackwardArguments p = make_arguments(problem);
  const auto floats = [&](std::size_t offset) { return reinterpret_cast<float*>(memory + offset); };
  p.lse2 = floats(layout.prepare.lse2_offset);
  p.softmax_d = floats(layout.prepare.d_offset);
  p.statistic_rows = layout.prepare.rows;
  p.splits = splits;
  p.heads_per_split = static_cast<int>(ceil_div(problem.group, splits));
  if (splits > 1) {
    p.dk_partial = floats(layout.dk_offset);
    p.dv_partial = floats(layout.dv_offset);
    p.partial_stride = (problem.packed_k ? 1 : problem.batch) * problem.rows_k * problem.heads_kv;
  }
  const DType dtype = problem.query.dtype;
  if (uses_query_pass(problem, instance)) {
    SINKATTN_RETURN_IF_ERROR(launch_query_pass(problem, instance, p, stream));
  }
  if (uses_accumulator(problem, instance)) {
    p.dq_accumulator = floats(layout.dq_offset);
    if (problem.deterministic) p.dq_turns = reinterpret_cast<int*>(memory + layout.turns_offset);
  }
  if (problem.dk.data != nullptr || p.dq_accumulator != nullptr) {
    SINKATTN_RETURN_IF_ERROR(launch_key_pass(problem, instance, p, stream));
  }
  if (p.dq_accumulator != nullptr) {
    SINKATTN_RETURN_IF_ERROR(launch_finish_queries(
        p, dtype, instance.dims.d, ceil_div(problem.longest_q, backward_tile_queries), stream));
  }
  if (splits > 1) {
    SINKATTN_RETURN_IF_ERROR(
        launch_finish_keys(p, dtype, instance.dims, problem.longest_k, stream));
  }
  return zero_unused(problem, true, stream);
}

bool wants_main_pass(const BackwardProblem& problem) {
  return problem.dq.data != nullptr || problem.dk.data != nullptr;
}

Status too_wide(const BackwardProblem& problem) {
  return Status::error(StatusCode::not_implemented,
                       "q: expected head dims of at most 256 on CUDA, got %lld and %lld",
                       static_cast<long long>(problem.head_dim),
                       static_cast<long long>(problem.head_dim_v));
}

}  // namespace

Status plan_backward(const BackwardProblem& problem, const DeviceProperties& device, Plan* plan) {
  if (problem.sm_margin > 0) {
    return Status::error(
        StatusCode::not_implemented,
        "sm_margin: expected 0 in the backward on CUDA, which uses every SM, got %d",
        problem.sm_margin);
  }
  plan->backend = Backend::hopper;
  if (!wants_main_pass(problem)) {
    plan->tile_m = static_cast<int>(prepare_tile_rows);
    plan->workspace_bytes = PrepareLayout(problem).bytes;
    std::snprintf(plan->kernel, sizeof(plan->kernel), "prepare_%s", dtype_name(problem.out.dtype));
    std::snprintf(plan->reason, sizeof(plan->reason),
                  "only D' and dsink are wanted: the prepare pass alone");
    return {};
  }
  const BackwardInstance* instance = find_instance(problem);
  if (instance == nullptr) return too_wide(problem);
  plan->num_splits = group_splits(problem, *instance, device.sm_count);
  plan->tile_m = backward_tile_queries;
  plan->tile_n = instance->key_pass_keys;
  plan->workspace_bytes = Workspace(problem, *instance, plan->num_splits).bytes;
  std::snprintf(plan->kernel, sizeof(plan->kernel), "backward_%s_d%d_dv%d%s",
                dtype_name(problem.query.dtype), instance->dims.d, instance->dims.dv,
                problem.softcap != 0.0 ? "_softcap" : "");
  std::snprintf(plan->reason, sizeof(plan->reason),
                "%s; blocks of %d keys, the query heads of a group in %d part(s)",
                problem.dq.data == nullptr            ? "no dq"
                : uses_query_pass(problem, *instance) ? "dq in a pass of its own"
                : problem.deterministic               ? "dq added to an fp32 accumulator in turn"
                                                      : "dq added to an fp32 accumulator",
                instance->key_pass_keys, plan->num_splits);
  return {};
}

Status backward(const BackwardProblem& problem, const Plan& plan, const ExecutionContext& context) {
  const cudaStream_t stream = stream_of(context);
  if (!wants_main_pass(problem)) return launch_prepare(problem, context.workspace, {}, stream);
  const BackwardInstance* instance = find_instance(problem);
  if (instance == nullptr) return too_wide(problem);
  const Workspace layout(problem, *instance, plan.num_splits);
  char* memory = static_cast<char*>(context.workspace);
  PrepareAccumulator accumulator;
  if (uses_accumulator(problem, *instance)) {
    int* turns =
        problem.deterministic ? reinterpret_cast<int*>(memory + layout.turns_offset) : nullptr;
    accumulator = {reinterpret_cast<float*>(memory + layout.dq_offset), turns, instance->dims.d};
  }
  SINKATTN_RETURN_IF_ERROR(launch_prepare(problem, memory, accumulator, stream));
  return launch_main(problem, *instance, plan.num_splits, layout, memory, stream);
}

}  // namespace sinkattn::hopper
