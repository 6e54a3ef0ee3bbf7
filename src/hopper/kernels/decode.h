// SPDX-License-Identifier: Apache-2.0
// Attention of few query rows against a long cache: parameters, workspace and launch of the decode
// kernel (decode.cuh). docs/decode.md explains the design.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "common/problem.h"
#include "sinkattn/plan.h"
#include "sinkattn/status.h"

namespace sinkattn::hopper {

/// n / d for 0 <= n < 2^31 by multiplication; d >= 1.
struct FastDivisor {
  std::uint32_t divisor = 1, multiplier = 0, shift = 0;

  FastDivisor() = default;
  explicit FastDivisor(std::uint32_t d);

#if defined(__CUDACC__)
  __device__ int divide(int n) const {
    if (divisor == 1) return n;
    return static_cast<int>(
        (static_cast<std::uint64_t>(static_cast<std::uint32_t>(n)) * multiplier) >> shift);
  }
#endif
};

/// Workspace slots of the pieces of one row tile, the entry-th of the list for the merge. Balanced,
/// entry is the block that has piece 0; a block has two slots, for the row tile that it continues
/// and for the one that it begins.
struct DecodeSlots {
  std::int64_t first, rest;
  int step;

#if defined(__CUDACC__)
  __device__ DecodeSlots(int splits, int entry)
      : first(splits > 0 ? std::int64_t{entry} * splits : 2 * std::int64_t{entry} + 1),
        rest(splits > 0 ? first : first - 1),
        step(splits > 0 ? 1 : 2) {}
  __device__ std::int64_t of(int piece) const {
    return piece == 0 ? first : rest + std::int64_t{piece} * step;
  }
#endif
};

/// A row tile whose pieces several blocks have written to the workspace: one entry of the list that
/// the merge works off. At most one piece: nothing to do.
struct DecodeCut {
  std::int64_t first_q;  ///< row of position 0 in the query tensor
  int pieces, entry;     ///< entry: of DecodeSlots
  int b, kv_head;
  int first_row, rows;  ///< packed rows of the sequence
};

/// What the kernel reads; passed by value.
struct DecodeParams {
  HeadsTensor query, out;
  KeyStorage keys;
  RowsTensor lse;
  VectorView sink;
  SequenceSide side_q, side_k;
  Mask32 mask;
  int batch, heads_kv, group, head_dim, head_dim_v;
  bool packed_q, packed_k;
  float scale;       ///< of a raw score, in natural units; 1 with a softcap
  float scale_log2;  ///< the same times log2 e
  float softcap;     ///< 0: off
  float softcap_in;  ///< 2 log2 e * softmax_scale / softcap: argument of the tanh
  FastDivisor page_size, by_group;
  int row_tiles;       ///< of the longest sequence
  int splits;          ///< n: every row tile in n pieces; 0: work shared out evenly over the grid
  int min_tiles;       ///< key tiles of a piece, at least; fewer pieces if there are too few
  float* partial_out;  ///< (slot, row, column), normalised, sink-free
  float* partial_lse;  ///< (slot, row)
  DecodeCut* cuts;     ///< null: no row tile is shared by blocks that do not merge at once
  bool list_by_unit;   ///< balanced: an entry of `cuts` per row tile, not per block
};

/// How one problem is run: instance, grid and workspace.
struct DecodeLaunch {
  int columns = 0, columns_v = 0;  ///< compiled pair of head dims
  int rows = 0;                    ///< packed query rows of a block: 16 or 32
  int tile_keys = 0;               ///< keys that the warps of a block take in one step
  int splits = 1;                  ///< as in DecodeParams
  int row_tiles = 1;               ///< of the longest sequence
  int grid = 0;
  int cuts = 0;  ///< entries of the list for the merge
  bool list_by_unit = false;
  std::int64_t slots = 0;  ///< pieces in the workspace
  std::size_t lse_offset = 0, cuts_offset = 0, bytes = 0;
};

/// Fills `launch` for a device with `sm_count` multiprocessors; not_implemented if nothing serves.
Status make_decode_launch(const ForwardProblem& problem, int sm_count, DecodeLaunch* launch);

/// The launch that a plan has recorded.
Status restore_decode_launch(const ForwardProblem& problem, const Plan& plan, DecodeLaunch* launch);

/// Runs prepare (if needed) and decode on `stream`.
Status launch_decode(const ForwardProblem& problem, const DecodeLaunch& launch, void* workspace,
                     cudaStream_t stream);

/// One per file in src/hopper/instances.
template <int Columns, int ColumnsV, int RowTiles, bool Bf16>
Status launch_decode_instance(const DecodeParams& params, int grid, cudaStream_t stream);

/// Fills output rows with 0 and LSE with -inf, before the decode kernel.
struct DecodeFill {
  HeadsTensor out;
  RowsTensor lse;
  std::int64_t batch = 0, rows = 0, heads = 0, head_dim_v = 0;
};
Status launch_decode_fill(const DecodeFill& fill, cudaStream_t stream);

/// Merges the row tiles of a list, after the decode kernel. `rows`: of a row tile, at most;
/// `pieces`: of one, about.
struct DecodeMerge {
  HeadsTensor out;
  RowsTensor lse;
  VectorView sink;
  const float* partial_out;
  const float* partial_lse;
  const DecodeCut* cuts;
  int splits;  ///< as in DecodeParams
  int tile_rows, columns, group, head_dim_v, heads_kv, row_tiles;
  bool packed_q;
  bool by_unit;  ///< entries are those of (sequence, row tile, KV head), the last fastest
};
Status launch_decode_merge(const DecodeMerge& merge, int entries, int rows, int pieces,
                           cudaStream_t stream);

}  // namespace sinkattn::hopper
