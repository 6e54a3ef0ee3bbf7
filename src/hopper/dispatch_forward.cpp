// SPDX-License-Identifier: Apache-2.0
// The forward on Hopper: which kernel serves a problem, in which order, with how many splits.
#include <algorithm>
#include <cstdio>
#include <limits>
#include <numeric>

#include "common/backend.h"
#include "hopper/core/tensor_map.h"
#include "hopper/device.h"
#include "hopper/dispatch.h"
#include "hopper/forward_tuning.h"
#include "hopper/kernels/combine.h"
#include "hopper/kernels/forward.h"
#include "hopper/kernels/unused_rows.h"
#include "hopper/launch.h"

namespace sinkattn::hopper {
namespace {

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

std::size_t aligned(std::int64_t bytes) {
  return static_cast<std::size_t>(ceil_div(bytes, 256) * 256);
}

ForwardUse use_of(const ForwardProblem& p) {
  if (p.mask.left >= 0 || p.mask.chunk > 0) return ForwardUse::window;
  // A packed sequence must not get another kernel, and other last bits, from its neighbours'
  // length.
  if (p.packed_k) return ForwardUse::general;
  return p.longest_k <= short_keys ? ForwardUse::short_keys : ForwardUse::general;
}

bool is_paged(const ForwardProblem& p) { return p.keys.page_table != nullptr; }

const ForwardInstance* instance_for(const ForwardProblem& p) {
  return find_forward(p.query.dtype, p.head_dim, p.head_dim_v, use_of(p), is_paged(p));
}

/// Rows of the boxes that key blocks are put together from: each lies in one page and starts at an
/// atom of eight rows of the stage.
std::int64_t page_box_rows(const ForwardProblem& p, int tile_n) {
  return std::gcd(p.keys.page_size, std::int64_t{tile_n});
}

/// The general kernel copies whole boxes: pages of a multiple of 8 slots, keys from slot 0 on. Ids
/// have 32 bits there.
bool takes_pages(const ForwardProblem& p) {
  return p.keys.page_size % 8 == 0 && p.side_k.leftpad == nullptr && p.keys.num_pages > 0 &&
         p.keys.num_pages <= std::numeric_limits<std::int32_t>::max();
}

/// Where things lie in the workspace.
struct ForwardLayout {
  std::int64_t rows;  ///< query rows of all batch entries
  std::size_t out_partial, lse_partial, bytes;

  ForwardLayout(const ForwardProblem& p, int splits) {
    rows = p.packed_q ? p.rows_q : p.batch * p.rows_q;
    out_partial = aligned(4);  // behind the tile counter
    const std::int64_t row_heads = splits > 1 ? splits * rows * p.heads_q : 0;
    lse_partial = out_partial + aligned(4 * row_heads * p.head_dim_v);
    bytes = lse_partial + aligned(4 * row_heads);
  }
};

/// Tiles of query rows: exact where dense, an upper bound where packed.
std::int64_t count_tiles(const ForwardProblem& p, int tile_m) {
  const std::int64_t tiles =
      p.packed_q ? ceil_div(p.rows_q, tile_m) + p.batch + 2 : p.batch * ceil_div(p.rows_q, tile_m);
  return tiles * p.heads_q;
}

/// Splits that fill the machine where there are few tiles and many keys.
int choose_splits(const ForwardProblem& p, const ForwardInstance& instance, int sms) {
  if (p.num_splits != 0) return p.num_splits;
  const std::int64_t tiles = count_tiles(p, instance.tile_m);
  const std::int64_t blocks = ceil_div(p.longest_k, instance.tile_n);
  const bool enough = static_cast<double>(tiles) >= enough_tiles_per_sm * sms;
  const bool few_keys = p.mask.left >= 0 || p.mask.chunk > 0;
  if (tiles == 0 || enough || few_keys) return 1;
  const std::int64_t wanted = std::min(sms / tiles, blocks / least_blocks_per_split);
  return static_cast<int>(std::clamp<std::int64_t>(wanted, 1, most_splits));
}

Status refuse(const ForwardProblem& p) {
  if (p.query.dtype != DType::bfloat16 && p.query.dtype != DType::float16) {
    return Status::error(StatusCode::not_implemented,
                         "q: expected bfloat16 or float16 on CUDA (%s has no CUDA kernel yet), got "
                         "%s",
                         dtype_name(p.query.dtype), dtype_name(p.query.dtype));
  }
  if (p.query_v.data != nullptr) {
    return Status::error(StatusCode::not_implemented,
                         "qv: expected none on CUDA (it has no CUDA kernel yet), got a tensor");
  }
  if (p.head_dim_v > 256) {
    return Status::error(StatusCode::not_implemented,
                         "v: expected a head dim <= 256 on CUDA, got %lld",
                         static_cast<long long>(p.head_dim_v));
  }
  if (p.longest_q > longest_32_bit || p.longest_k > longest_32_bit) {
    return Status::error(StatusCode::not_implemented,
                         "q: expected sequences below 2^30 tokens, got longer ones");
  }
  return {};
}

TileOrder make_order(const ForwardProblem& p, const ForwardInstance& instance, int splits,
                     std::int64_t l2_bytes) {
  TileOrder order;
  order.tile_rows = instance.tile_m;
  order.sequences = static_cast<std::int32_t>(p.batch);
  order.heads = static_cast<std::int32_t>(p.heads_q);
  order.group = static_cast<std::int32_t>(p.group);
  order.splits = splits;
  order.levels = static_cast<std::int32_t>(ceil_div(p.rows_q, instance.tile_m));
  order.packed = p.packed_q;
  order.units = static_cast<std::int32_t>(p.packed_q ? p.heads_kv : p.heads_kv * p.batch);
  const std::int64_t unit_bytes = 2 * p.rows_k * (p.head_dim + p.head_dim_v);
  const auto room = static_cast<std::int64_t>(section_of_l2 * static_cast<double>(l2_bytes));
  const std::int64_t fitting = unit_bytes > 0 ? room / unit_bytes : order.units;
  const std::int64_t most = std::clamp<std::int64_t>(fitting, 1, order.units);
  order.sections = static_cast<std::int32_t>(ceil_div(order.units, most));
  return order;
}

Status make_maps(const ForwardProblem& p, const ForwardInstance& instance, ForwardArguments* a) {
  const std::int64_t batches_q = p.packed_q ? 1 : p.batch;
  const std::int64_t batches_k = p.packed_k ? 1 : p.keys.cache_rows;
  HeadsTensor key = p.keys.key, value = p.keys.value;
  if (p.rows_k == 0 || batches_k == 0) key.data = value.data = p.query.data;  // never read
  SINKATTN_RETURN_IF_ERROR(make_tensor_map(
      tensor_map_key(p.query, p.head_dim, p.rows_q, p.heads_q, batches_q, instance.tile_m),
      &a->query));
  TensorMapKey key_map =
      tensor_map_key(key, p.head_dim, p.rows_k, p.heads_kv, batches_k, instance.tile_n);
  TensorMapKey value_map =
      tensor_map_key(value, p.head_dim_v, p.rows_k, p.heads_kv, batches_k, instance.tile_n);
  if (is_paged(p)) {
    a->page_box_rows = static_cast<std::int32_t>(page_box_rows(p, instance.tile_n));
    for (TensorMapKey* map : {&key_map, &value_map}) {
      map->ragged = false;
      map->rows = p.keys.page_size;
      map->batches = p.keys.num_pages;
      map->box_rows = a->page_box_rows;
    }
  }
  SINKATTN_RETURN_IF_ERROR(make_tensor_map(key_map, &a->key));
  SINKATTN_RETURN_IF_ERROR(make_tensor_map(value_map, &a->value));
  constexpr int rows_of_a_warp = 16;
  return make_tensor_map(
      tensor_map_key(p.out, p.head_dim_v, p.rows_q, p.heads_q, batches_q, rows_of_a_warp), &a->out);
}

void fill_scalars(const ForwardProblem& p, ForwardArguments* a) {
  constexpr double log2e = 1.4426950408889634;
  const bool capped = p.softcap > 0.0;
  a->side_q = p.side_q;
  a->side_k = p.side_k;
  a->mask = narrow_mask(p.mask);
  a->keys = p.keys;
  a->keys_packed = p.packed_k;
  a->zero_out = p.out;
  a->scale = static_cast<float>(capped ? 1.0 : p.softmax_scale);
  a->scale_log2 = static_cast<float>((capped ? 1.0 : p.softmax_scale) * log2e);
  a->rescale_limit = tolerated_growth_log2 / a->scale_log2;
  a->softcap = static_cast<float>(p.softcap);
  a->scale_over_cap = capped ? static_cast<float>(p.softmax_scale / p.softcap) : 0.0f;
  a->map_rows_q = static_cast<std::int32_t>(std::max<std::int64_t>(p.rows_q, 1));
  a->map_rows_k = static_cast<std::int32_t>(std::max<std::int64_t>(p.rows_k, 1));
  a->head_dim_v = static_cast<std::int32_t>(p.head_dim_v);
  a->query_slabs = static_cast<std::int32_t>(ceil_div(p.head_dim, 64));
  a->value_slabs = static_cast<std::int32_t>(ceil_div(p.head_dim_v, 64));
}

/// The merge of the splits; also says where the kernel puts its partial results.
CombineProblem merge_of(const ForwardProblem& p, int splits, char* workspace) {
  const ForwardLayout layout(p, splits);
  CombineProblem merge;
  merge.splits = splits;
  merge.batch = p.packed_q ? 1 : p.batch;
  merge.rows = p.rows_q;
  merge.heads = p.heads_q;
  merge.head_dim_v = p.head_dim_v;
  merge.out_partial.data = workspace + layout.out_partial;
  merge.out_partial.dtype = DType::float32;
  merge.out_partial.stride_head = p.head_dim_v;
  merge.out_partial.stride_row = p.heads_q * p.head_dim_v;
  merge.out_partial.stride_batch = p.rows_q * merge.out_partial.stride_row;
  merge.out_partial_stride_split = layout.rows * merge.out_partial.stride_row;
  merge.lse_partial.data = workspace + layout.lse_partial;
  merge.lse_partial.dtype = DType::float32;
  merge.lse_partial.stride_head = p.rows_q;
  merge.lse_partial.stride_batch = p.heads_q * p.rows_q;
  merge.lse_partial_stride_split = layout.rows * p.heads_q;
  merge.out = p.out;
  merge.lse = p.lse;
  merge.sink = p.sink;
  return merge;
}

void direct_to_partials(const CombineProblem& merge, ForwardArguments* a) {
  a->lse = merge.lse_partial;
  a->lse_stride_split = merge.lse_partial_stride_split;
  a->sink = {};  // the merge counts it once
  a->out_partial = static_cast<float*>(merge.out_partial.data);
  a->partial_stride_split = merge.out_partial_stride_split;
  a->partial_stride_batch = merge.out_partial.stride_batch;
  a->partial_stride_row = merge.out_partial.stride_row;
}

/// Few query rows, and pages that the general kernel cannot copy, are the decode kernel's.
bool is_decode(const ForwardProblem& p) {
  return decode_serves(p) || (is_paged(p) && !takes_pages(p));
}

bool is_empty(const ForwardProblem& p) { return p.batch == 0 || p.rows_q == 0 || p.heads_q == 0; }

}  // namespace

Status plan_forward(const ForwardProblem& p, const DeviceProperties& device, Plan* plan) {
  SINKATTN_RETURN_IF_ERROR(refuse(p));
  if (p.sm_margin >= device.sm_count) {
    return Status::error(StatusCode::value_error, "sm_margin: expected less than %d, got %d",
                         device.sm_count, p.sm_margin);
  }
  if (is_decode(p)) return plan_decode(p, device, plan);
  const ForwardInstance* instance = instance_for(p);
  if (instance == nullptr) {
    return Status::error(StatusCode::not_implemented,
                         "v: expected a head dim of at most that of the compiled pair, got %lld",
                         static_cast<long long>(p.head_dim_v));
  }
  plan->backend = Backend::hopper;
  plan->num_splits = choose_splits(p, *instance, device.sm_count - p.sm_margin);
  plan->pack_gqa = false;
  plan->tile_m = instance->tile_m;
  plan->tile_n = instance->tile_n;
  const std::int64_t tiles = count_tiles(p, instance->tile_m) * plan->num_splits;
  if (tiles > (std::int64_t{1} << 31) - 1 - device.sm_count) {
    return Status::error(StatusCode::not_implemented,
                         "q: expected fewer than 2^31 tiles of %d rows, got %lld", instance->tile_m,
                         static_cast<long long>(tiles));
  }
  plan->grid = static_cast<int>(std::min<std::int64_t>(tiles, device.sm_count - p.sm_margin));
  plan->l2_bytes = device.l2_bytes;
  // One tile per block and no splits: nothing to count, nothing to merge, nothing to allocate.
  if (tiles > plan->grid || plan->num_splits > 1) {
    plan->workspace_bytes = ForwardLayout(p, plan->num_splits).bytes;
  }
  if (!p.describe) return {};
  std::snprintf(plan->kernel, sizeof(plan->kernel), "%s", instance->name);
  std::snprintf(plan->reason, sizeof(plan->reason),
                "head dims %lld, %lld run as %d, %d; %s; each block of %d walks over tiles of one "
                "query head, the longest first",
                static_cast<long long>(p.head_dim), static_cast<long long>(p.head_dim_v),
                instance->head_dim, instance->head_dim_v,
                plan->num_splits == 1 ? "no splits" : "splits are merged by a second kernel",
                plan->grid);
  return {};
}

Status forward(const ForwardProblem& p, const Plan& plan, const ExecutionContext& context) {
  if (is_decode(p)) return run_decode(p, plan, context);
  if (is_empty(p)) return {};
  const ForwardInstance* instance = instance_for(p);
  const cudaStream_t stream = stream_of(context);
  char* workspace = static_cast<char*>(context.workspace);
  ForwardArguments a{};
  SINKATTN_RETURN_IF_ERROR(make_maps(p, *instance, &a));
  fill_scalars(p, &a);
  a.order = make_order(p, *instance, plan.num_splits, plan.l2_bytes);
  a.lse = p.lse;
  a.sink = p.sink;
  CombineProblem merge;
  if (plan.num_splits > 1) {
    merge = merge_of(p, plan.num_splits, workspace);
    direct_to_partials(merge, &a);
  }
  if (count_tiles(p, instance->tile_m) * plan.num_splits > plan.grid) {
    a.order.counter = reinterpret_cast<std::int32_t*>(workspace);
    SINKATTN_RETURN_IF_ERROR(
        cuda_status(cudaMemsetAsync(a.order.counter, 0, 4, stream), "tile counter"));
  }
  SINKATTN_RETURN_IF_ERROR(
      launch_kernel(instance->kernel, instance->name,
                    {static_cast<unsigned>(plan.grid), static_cast<unsigned>(instance->threads),
                     instance->shared_bytes},
                    &a, stream));
  if (plan.num_splits == 1) return {};
  SINKATTN_RETURN_IF_ERROR(launch_combine(merge, stream));
  if (!p.packed_q && p.side_q.seqused == nullptr) return {};
  return launch_clear_unused_rows(p, stream);
}

}  // namespace sinkattn::hopper
