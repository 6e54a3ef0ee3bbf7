// SPDX-License-Identifier: Apache-2.0
// Host side of the decode kernel: which instance, how the work is cut, what the workspace holds.
#include "hopper/kernels/decode.h"

#include <algorithm>
#include <iterator>
#include <limits>

#include "hopper/decode_tuning.h"

namespace sinkattn::hopper {
namespace {

constexpr double log2e = 1.4426950408889634;

struct Pair {
  int columns, columns_v;
};
constexpr Pair pairs[] = {{64, 64}, {96, 96}, {128, 128}, {192, 128}, {256, 256}};

std::size_t aligned(std::int64_t bytes) {
  return static_cast<std::size_t>((bytes + 255) / 256 * 256);
}

/// Keys between the first visible and the last of `rows` packed rows, at most.
std::int64_t longest_range(const ForwardProblem& p, std::int64_t rows) {
  const std::int64_t positions = std::min(p.longest_q, (rows + p.group - 2) / p.group + 1);
  std::int64_t keys = p.longest_k;
  if (p.mask.left >= 0 && p.mask.right >= 0) {
    keys = std::min(keys, p.mask.left + p.mask.right + positions);
  }
  if (p.mask.chunk > 0) keys = std::min(keys, p.mask.chunk + positions - 1);
  return keys;
}

bool outputs_outside_sequences(const ForwardProblem& p) {
  return p.packed_q || p.side_q.seqused != nullptr;
}

std::int64_t packed_rows(const ForwardProblem& p) { return p.longest_q * p.group; }

std::int64_t units(const ForwardProblem& p, const DecodeLaunch& launch) {
  return p.batch * launch.row_tiles * p.heads_kv;
}

DecodeTuning tuning_of(const DecodeLaunch& launch) {
  return decode_tuning(launch.columns, launch.columns_v, launch.rows / 16);
}

/// Compiled pair of head dims, packed rows of a block, row tiles.
Status choose_instance(const ForwardProblem& p, DecodeLaunch* launch) {
  *launch = {};
  const auto fits = [&](const Pair& pair) {
    return p.head_dim <= pair.columns && p.head_dim_v <= pair.columns_v;
  };
  const Pair* pair = std::find_if(std::begin(pairs), std::end(pairs), fits);
  const bool sixteen_bit = p.query.dtype == DType::bfloat16 || p.query.dtype == DType::float16;
  if (pair == std::end(pairs) || !sixteen_bit || p.query_v.data != nullptr) {
    return Status::error(StatusCode::not_implemented,
                         "q: expected bfloat16 or float16 with head dims of at most 256 and no qv "
                         "(the CPU backend serves more), got another");
  }
  if (packed_rows(p) > std::numeric_limits<std::int32_t>::max()) {
    return Status::error(StatusCode::not_implemented,
                         "q: expected fewer than 2^31 queries times heads of a group per sequence, "
                         "got more");
  }
  launch->columns = pair->columns;
  launch->columns_v = pair->columns_v;
  launch->rows = packed_rows(p) > 16 && pair->columns <= 128 ? 32 : 16;
  launch->row_tiles = static_cast<int>((packed_rows(p) + launch->rows - 1) / launch->rows);
  const DecodeTuning tuning = tuning_of(*launch);
  launch->tile_keys = tuning.warps * tuning.keys;
  return {};
}

/// Grid and workspace.
Status set_grid(const ForwardProblem& p, std::int64_t grid, DecodeLaunch* launch) {
  if (grid > std::numeric_limits<std::int32_t>::max()) {
    return Status::error(StatusCode::not_implemented,
                         "q: expected fewer than 2^31 tiles of rows times splits, got more");
  }
  launch->grid = static_cast<int>(grid);
  if (launch->splits == 1) return {};
  // Balanced, a block begins one row tile that others continue, and continues one.
  launch->slots = launch->splits == 0 ? 2 * grid : grid;
  // The shorter list: a row tile has one entry, a block begins one cut row tile at most. A row tile
  // that a sequence may not have has nobody to write its entry.
  launch->list_by_unit =
      launch->splits == 0 && units(p, *launch) <= grid && !outputs_outside_sequences(p);
  const bool by_block = launch->splits == 0 && !launch->list_by_unit;
  launch->cuts = static_cast<int>(by_block ? grid : units(p, *launch));
  launch->lse_offset = aligned(4 * launch->slots * launch->rows * launch->columns_v);
  launch->cuts_offset = launch->lse_offset + aligned(4 * launch->slots * launch->rows);
  launch->bytes =
      launch->cuts_offset + aligned(launch->cuts * static_cast<std::int64_t>(sizeof(DecodeCut)));
  return {};
}

template <int Columns, int ColumnsV, bool Bf16>
Status launch_instance(const DecodeParams& params, const DecodeLaunch& launch,
                       cudaStream_t stream) {
  if constexpr (Columns <= 128) {
    if (launch.rows == 32) {
      return launch_decode_instance<Columns, ColumnsV, 2, Bf16>(params, launch.grid, stream);
    }
  }
  return launch_decode_instance<Columns, ColumnsV, 1, Bf16>(params, launch.grid, stream);
}

template <bool Bf16>
Status launch_pair(const DecodeParams& params, const DecodeLaunch& launch, cudaStream_t stream) {
  switch (launch.columns) {
    case 64:
      return launch_instance<64, 64, Bf16>(params, launch, stream);
    case 96:
      return launch_instance<96, 96, Bf16>(params, launch, stream);
    case 128:
      return launch_instance<128, 128, Bf16>(params, launch, stream);
    case 192:
      return launch_instance<192, 128, Bf16>(params, launch, stream);
    default:
      return launch_instance<256, 256, Bf16>(params, launch, stream);
  }
}

Status fill_rows(const ForwardProblem& p, cudaStream_t stream) {
  DecodeFill fill;
  fill.out = p.out;
  fill.lse = p.lse;
  fill.batch = p.packed_q ? 1 : p.batch;
  fill.rows = p.rows_q;
  fill.heads = p.heads_q;
  fill.head_dim_v = p.head_dim_v;
  return launch_decode_fill(fill, stream);
}

Status merge_pieces(const ForwardProblem& p, const DecodeLaunch& launch, const DecodeParams& params,
                    cudaStream_t stream) {
  DecodeMerge merge = {};
  merge.out = p.out;
  merge.lse = p.lse;
  merge.sink = p.sink;
  merge.partial_out = params.partial_out;
  merge.partial_lse = params.partial_lse;
  merge.cuts = params.cuts;
  merge.splits = launch.splits;
  merge.tile_rows = launch.rows;
  merge.columns = launch.columns_v;
  merge.group = params.group;
  merge.head_dim_v = params.head_dim_v;
  merge.packed_q = p.packed_q;
  merge.heads_kv = params.heads_kv;
  merge.row_tiles = params.row_tiles;
  merge.by_unit = launch.splits > 0 || launch.list_by_unit;
  const auto pieces =
      static_cast<int>(launch.splits > 0 ? launch.splits : launch.grid / units(p, launch) + 1);
  const auto rows = static_cast<int>(std::min<std::int64_t>(launch.rows, packed_rows(p)));
  return launch_decode_merge(merge, launch.cuts, rows, pieces, stream);
}

}  // namespace

FastDivisor::FastDivisor(std::uint32_t d) : divisor(d) {
  if (d == 1) return;
  // ceil(2^s / d) with s = 31 + ceil(log2 d) is exact for 31-bit numerators and fits 32 bits.
  int log = 0;
  while ((std::uint64_t{1} << log) < d) ++log;
  shift = static_cast<std::uint32_t>(31 + log);
  multiplier = static_cast<std::uint32_t>(((std::uint64_t{1} << shift) + d - 1) / d);
}

Status make_decode_launch(const ForwardProblem& p, int sm_count, DecodeLaunch* launch) {
  SINKATTN_RETURN_IF_ERROR(choose_instance(p, launch));
  const std::int64_t range = longest_range(p, std::min<std::int64_t>(packed_rows(p), launch->rows));
  const std::int64_t sms = std::max(1, sm_count - p.sm_margin);
  const std::int64_t resident = sms * tuning_of(*launch).blocks;
  launch->splits = p.num_splits;
  if (p.num_splits == 0) {
    const std::int64_t line = units(p, *launch) * (p.longest_k / launch->tile_keys + 1);
    if (range <= decode_unsplit_keys || launch->row_tiles > decode_balanced_row_tiles ||
        line >= longest_32_bit) {
      launch->splits = 1;
    } else if (p.batch == 1) {  // nothing to balance
      launch->splits = static_cast<int>(std::clamp<std::int64_t>(
          resident / std::max<std::int64_t>(1, units(p, *launch)), 1, decode_max_pieces));
    }
  }
  return set_grid(p, launch->splits == 0 ? resident : launch->splits * units(p, *launch), launch);
}

Status restore_decode_launch(const ForwardProblem& p, const Plan& plan, DecodeLaunch* launch) {
  SINKATTN_RETURN_IF_ERROR(choose_instance(p, launch));
  launch->splits = plan.num_splits;
  return set_grid(p, plan.grid, launch);
}

Status launch_decode(const ForwardProblem& p, const DecodeLaunch& launch, void* workspace,
                     cudaStream_t stream) {
  char* memory = static_cast<char*>(workspace);
  DecodeParams params = {};
  params.query = p.query;
  params.out = p.out;
  params.keys = p.keys;
  params.lse = p.lse;
  params.sink = p.sink;
  params.side_q = p.side_q;
  params.side_k = p.side_k;
  params.mask = narrow_mask(p.mask);
  params.batch = static_cast<int>(p.batch);
  params.heads_kv = static_cast<int>(p.heads_kv);
  params.group = static_cast<int>(p.group);
  params.head_dim = static_cast<int>(p.head_dim);
  params.head_dim_v = static_cast<int>(p.head_dim_v);
  params.packed_q = p.packed_q;
  params.packed_k = p.packed_k;
  // With a softcap the scores are in natural units once it is applied.
  const double scale = p.softcap > 0.0 ? 1.0 : p.softmax_scale;
  params.scale = static_cast<float>(scale);
  params.scale_log2 = static_cast<float>(scale * log2e);
  params.softcap = static_cast<float>(p.softcap);
  params.softcap_in =
      p.softcap > 0.0 ? static_cast<float>(2.0 * log2e * p.softmax_scale / p.softcap) : 0.0f;
  const std::int64_t page_size = std::max<std::int64_t>(1, p.keys.page_size);
  params.page_size = FastDivisor(static_cast<std::uint32_t>(page_size));
  params.by_group = FastDivisor(static_cast<std::uint32_t>(p.group));
  params.row_tiles = launch.row_tiles;
  params.splits = launch.splits;
  params.list_by_unit = launch.list_by_unit;
  params.min_tiles = p.num_splits > 0     ? 1
                     : launch.splits == 0 ? decode_min_tiles
                                          : decode_min_tiles_alone;
  params.partial_out = reinterpret_cast<float*>(memory);
  params.partial_lse = reinterpret_cast<float*>(memory + launch.lse_offset);
  params.cuts =
      launch.cuts > 0 ? reinterpret_cast<DecodeCut*>(memory + launch.cuts_offset) : nullptr;

  if (outputs_outside_sequences(p)) SINKATTN_RETURN_IF_ERROR(fill_rows(p, stream));
  if (launch.grid == 0 || p.batch == 0 || packed_rows(p) == 0) return {};
  SINKATTN_RETURN_IF_ERROR(p.query.dtype == DType::bfloat16
                               ? launch_pair<true>(params, launch, stream)
                               : launch_pair<false>(params, launch, stream));
  if (params.cuts == nullptr) return {};
  return merge_pieces(p, launch, params, stream);
}

}  // namespace sinkattn::hopper
