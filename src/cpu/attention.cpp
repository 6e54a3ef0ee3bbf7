// SPDX-License-Identifier: Apache-2.0
// Forward and backward of the CPU backend: plans, and the loops over tiles.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

#include "common/backend.h"
#include "common/schedule.h"
#include "cpu/combine.h"
#include "cpu/element.h"
#include "cpu/fast.h"
#include "cpu/parallel.h"
#include "cpu/reference.h"
#include "cpu/rows.h"

namespace sinkattn::cpu {
namespace {

constexpr std::int64_t alignment = 256;  // of every piece of the workspace

std::int64_t aligned(std::int64_t bytes) { return (bytes + alignment - 1) / alignment * alignment; }

bool is_reference(const HeadsTensor& query) { return query.dtype == DType::float64; }

/// (sequence, KV head, tile) from a flat index, tile fastest.
struct TileIndex {
  std::int64_t b, kv_head, tile;
  TileIndex(const AttentionShape& shape, std::int64_t tiles, std::int64_t item)
      : b(item / tiles / shape.heads_kv),
        kv_head(item / tiles % shape.heads_kv),
        tile(item % tiles) {}
};

std::int64_t query_tiles(const AttentionShape& shape) {
  return ceil_div(shape.longest_q, positions_per_tile(shape.group));
}

/// Splits pay only where there are fewer tiles than cores and several key blocks to share out.
int choose_splits(const ForwardProblem& p) {
  if (p.num_splits > 0) return p.num_splits;
  const std::int64_t items = p.batch * p.heads_kv * query_tiles(p);
  const int cores = lanes_for(std::numeric_limits<std::int64_t>::max());
  const std::int64_t blocks = ceil_div(p.longest_k, fast_tile_keys);
  if (items == 0 || items >= cores || blocks < 4) return 1;
  const std::int64_t wanted = cores / items;
  return static_cast<int>(
      std::clamp<std::int64_t>(wanted, 1, std::min<std::int64_t>(blocks / 2, 16)));
}

std::int64_t partial_rows(const ForwardProblem& p) {
  return storage_batch(p.packed_q, p.batch) * p.rows_q * p.heads_q;
}

std::int64_t partial_out_bytes(const ForwardProblem& p, int splits) {
  return splits == 1 ? 0 : aligned(4 * splits * partial_rows(p) * p.head_dim_v);
}

std::int64_t partial_lse_bytes(const ForwardProblem& p, int splits) {
  return splits == 1 ? 0 : aligned(4 * splits * partial_rows(p));
}

int forward_lanes(const ForwardProblem& p, int splits) {
  return lanes_for(p.batch * p.heads_kv * query_tiles(p) * splits);
}

/// Merges split results; the sink enters here, once.
void combine_splits(const ForwardProblem& p, int splits, const Partials& partials,
                    const ExecutionContext& context) {
  CombineProblem merge;
  merge.splits = splits;
  merge.batch = storage_batch(p.packed_q, p.batch);
  merge.rows = p.rows_q;
  merge.heads = p.heads_q;
  merge.head_dim_v = p.head_dim_v;
  merge.out_partial = {partials.out, DType::float32, p.rows_q * p.heads_q * p.head_dim_v,
                       p.heads_q * p.head_dim_v, p.head_dim_v};
  merge.out_partial_stride_split = partial_rows(p) * p.head_dim_v;
  merge.lse_partial = {partials.lse, DType::float32, p.rows_q * p.heads_q, 1, p.heads_q};
  merge.lse_partial_stride_split = partial_rows(p);
  merge.out = p.out;
  merge.lse = p.lse;
  merge.sink = p.sink;
  // Rows outside every sequence must stay 0 and -inf instead of becoming the sink: only used rows
  // are merged.
  for_each_item(context, p.batch, lanes_for(p.batch), [&](int, std::int64_t b) {
    const SequenceInfo queries = resolve_sequence(p.side_q, b);
    merge_rows(merge, p.packed_q ? 0 : b, {queries.first_row, queries.first_row + queries.length});
  });
}

}  // namespace

Status plan_forward(const ForwardProblem& p, Plan* plan) {
  plan->backend = Backend::cpu;
  plan->pack_gqa = p.group > 1;
  if (is_reference(p.query)) {
    plan->num_splits = 1;
    plan->tile_m = plan->tile_n = 1;
    std::snprintf(plan->kernel, sizeof(plan->kernel), "cpu_reference_forward_fp64");
    std::snprintf(plan->reason, sizeof(plan->reason),
                  "float64: the oracle, row by row; splits change nothing there");
    return {};
  }
  const FastPath& path = fast_path();
  plan->num_splits = choose_splits(p);
  plan->tile_m = static_cast<int>(positions_per_tile(p.group) * p.group);
  plan->tile_n = static_cast<int>(fast_tile_keys);
  const std::int64_t lane = aligned(path.forward_lane_bytes(p));
  plan->workspace_bytes = static_cast<std::size_t>(forward_lanes(p, plan->num_splits) * lane +
                                                   partial_out_bytes(p, plan->num_splits) +
                                                   partial_lse_bytes(p, plan->num_splits));
  if (!p.describe) return {};
  std::snprintf(plan->kernel, sizeof(plan->kernel), "cpu_forward_%s_%s", path.name,
                dtype_name(p.query.dtype));
  std::snprintf(plan->reason, sizeof(plan->reason),
                "blocked fp32 arithmetic, %d query rows (all heads of a group) x %d keys",
                plan->tile_m, plan->tile_n);
  return {};
}

Status forward(const ForwardProblem& p, const Plan& plan, const ExecutionContext& context) {
  if (is_reference(p.query)) {
    reference::forward(p, context);
    return {};
  }
  const std::int64_t batch = storage_batch(p.packed_q, p.batch);
  zero_rows(p.out, batch, p.rows_q, p.heads_q, p.head_dim_v);
  fill_statistics(p.lse, batch, p.heads_q, p.rows_q, -std::numeric_limits<double>::infinity());
  const FastPath& path = fast_path();
  const int splits = plan.num_splits;
  char* memory = static_cast<char*>(context.workspace);
  Partials partials;
  if (splits > 1) {
    partials.out = reinterpret_cast<float*>(memory);
    memory += partial_out_bytes(p, splits);
    partials.lse = reinterpret_cast<float*>(memory);
    memory += partial_lse_bytes(p, splits);
  }
  const std::int64_t tiles = query_tiles(p);
  const std::int64_t items = p.batch * p.heads_kv * tiles;
  const std::int64_t lane_bytes = aligned(path.forward_lane_bytes(p));
  const std::int64_t step = positions_per_tile(p.group);
  for_each_item(context, items * splits, forward_lanes(p, splits), [&](int lane, std::int64_t i) {
    const TileIndex index(p, tiles, i % items);
    path.forward_tile(p, splits, partials,
                      {index.b, index.kv_head, index.tile * step, static_cast<int>(i / items)},
                      memory + lane * lane_bytes);
  });
  if (splits > 1) combine_splits(p, splits, partials, context);
  return {};
}

namespace {

std::int64_t statistics_bytes(const BackwardProblem& p) {
  return aligned(4 * storage_batch(p.packed_q, p.batch) * p.rows_q * p.heads_q);
}

std::int64_t key_tiles(const BackwardProblem& p) { return ceil_div(p.longest_k, fast_tile_keys); }

int backward_lanes(const BackwardProblem& p) {
  return lanes_for(p.batch * p.heads_kv * std::max(query_tiles(p), key_tiles(p)));
}

/// dsink of a head: fp64 sum over its rows in storage order.
void sink_gradient(const BackwardProblem& p, const float* d_rows, std::int64_t head) {
  const double sink = p.sink.data == nullptr
                          ? -std::numeric_limits<double>::infinity()
                          : load_element(p.sink.data, p.sink.dtype, head * p.sink.stride[0]);
  double sum = 0.0;
  // A sink of -inf has no weight in any row; one of +inf makes every row constant.
  for (std::int64_t b = 0; b < p.batch && !std::isinf(sink); ++b) {
    const SequenceInfo queries = resolve_sequence(p.side_q, b);
    const std::int64_t batch = p.packed_q ? 0 : b;
    const float* lse = static_cast<const float*>(p.lse.data);
    for (std::int64_t i = 0; i < queries.length; ++i) {
      const std::int64_t row = queries.first_row + i;
      const double row_lse = static_cast<double>(lse[p.lse.offset(batch, head, row)]);
      if (row_lse == -std::numeric_limits<double>::infinity()) continue;  // the row saw nothing
      const double weight = std::exp(sink - row_lse);
      sum -= weight * static_cast<double>(d_rows[(batch * p.heads_q + head) * p.rows_q + row]);
    }
  }
  store_element(p.dsink.data, p.dsink.dtype, head * p.dsink.stride[0], sum);
}

}  // namespace

Status plan_backward(const BackwardProblem& p, Plan* plan) {
  plan->backend = Backend::cpu;
  if (is_reference(p.query)) {
    plan->workspace_bytes = reference::backward_workspace(p);
    plan->tile_m = plan->tile_n = 1;
    std::snprintf(plan->kernel, sizeof(plan->kernel), "cpu_reference_backward_fp64");
    std::snprintf(plan->reason, sizeof(plan->reason), "float64: the oracle, row by row");
    return {};
  }
  const FastPath& path = fast_path();
  plan->tile_m = static_cast<int>(positions_per_tile(p.group) * p.group);
  plan->tile_n = static_cast<int>(fast_tile_keys);
  plan->pack_gqa = p.group > 1;
  plan->workspace_bytes = static_cast<std::size_t>(
      backward_lanes(p) * aligned(path.backward_lane_bytes(p)) + statistics_bytes(p));
  if (!p.describe) return {};
  const bool main_pass = p.dq.data != nullptr || p.dk.data != nullptr;
  std::snprintf(plan->kernel, sizeof(plan->kernel), "cpu_backward_%s_%s%s", path.name,
                dtype_name(p.query.dtype), main_pass ? "" : "_prepare");
  std::snprintf(plan->reason, sizeof(plan->reason),
                main_pass ? "two passes over tiles (dq; dk and dv): no atomics, always repeatable"
                          : "only D' and dsink are wanted: the prepare pass alone");
  return {};
}

Status backward(const BackwardProblem& p, const Plan&, const ExecutionContext& context) {
  if (is_reference(p.query)) {
    reference::backward(p, context);
    return {};
  }
  const std::int64_t batch_q = storage_batch(p.packed_q, p.batch);
  const std::int64_t batch_k = storage_batch(p.packed_k, p.batch);
  zero_rows(p.dq, batch_q, p.rows_q, p.heads_q, p.head_dim);
  zero_rows(p.dk, batch_k, p.rows_k, p.heads_kv, p.head_dim);
  zero_rows(p.dv, batch_k, p.rows_k, p.heads_kv, p.head_dim_v);
  fill_statistics(p.softmax_d, batch_q, p.heads_q, p.rows_q, 0.0);
  const FastPath& path = fast_path();
  float* d_rows = static_cast<float*>(context.workspace);
  char* memory = static_cast<char*>(context.workspace) + statistics_bytes(p);
  const std::int64_t lane_bytes = aligned(path.backward_lane_bytes(p));
  const int lanes = backward_lanes(p);
  const auto run = [&](auto tile_function, std::int64_t tiles, std::int64_t step) {
    for_each_item(context, p.batch * p.heads_kv * tiles, lanes, [&](int lane, std::int64_t i) {
      const TileIndex index(p, tiles, i);
      tile_function(p, d_rows, {index.b, index.kv_head, index.tile * step},
                    memory + lane * lane_bytes);
    });
  };
  const std::int64_t step = positions_per_tile(p.group);
  run(path.prepare_tile, query_tiles(p), step);
  if (p.dq.data != nullptr) run(path.query_tile, query_tiles(p), step);
  if (p.dk.data != nullptr) run(path.key_tile, key_tiles(p), fast_tile_keys);
  if (p.dsink.data != nullptr) {
    for_each_item(context, p.heads_q, lanes_for(p.heads_q),
                  [&](int, std::int64_t head) { sink_gradient(p, d_rows, head); });
  }
  return {};
}

}  // namespace sinkattn::cpu
