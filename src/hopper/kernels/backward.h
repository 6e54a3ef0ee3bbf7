// SPDX-License-Identifier: Apache-2.0
// What the kernels of the backward share: their argument, and the workspace of a problem.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "common/problem.h"
#include "hopper/kernels/prepare.h"
#include "sinkattn/status.h"

namespace sinkattn::hopper {

/// Argument of every kernel after the prepare pass. Sequence, head and tile of a block follow from
/// its index (core/backward_work.cuh).
struct BackwardArguments {
  CUtensorMap query, dout, key, value;
  HeadsTensor dq, dk, dv;
  const float* lse2;  ///< prepare's statistics, see PrepareLayout
  const float* softmax_d;
  float* dq_accumulator;  ///< (b, h, rows, d) fp32 in tiles of 64 rows, fragment order; or null
  int* dq_turns;          ///< deterministic: per tile of the accumulator, key tiles added; or null
  float* dk_partial;      ///< (splits, b, rows_k, hk, d) fp32 where a group is split; or null
  float* dv_partial;
  SequenceSide side_q, side_k;
  Mask mask;
  std::int64_t rows_q, rows_k;  ///< rows of the tensors: bounds of the tensor maps
  std::int64_t statistic_rows;  ///< PrepareLayout::rows
  std::int64_t partial_stride;  ///< rows of one split's partial gradients, times hk
  float softmax_scale;
  /// The exponent of a raw score S in units of log2: S * score_scale, with softcap
  /// tanh(S * score_scale) * score_cap. score_cap is 0 without softcap.
  float score_scale, score_cap;
  int heads_q, heads_kv, group;
  int splits, heads_per_split;  ///< query heads of a group that one block of the key pass handles
  int head_dim, head_dim_v;
  int batch, tiles, section;  ///< tiles per (sequence, head); pairs scheduled together
  bool packed_q, packed_k, has_dout;
  bool alternate;  ///< every other section of the key pass takes its query tiles upwards
};

/// Head dims that the kernels are compiled for; a problem runs padded to the next pair.
struct CompiledDims {
  int d = 0, dv = 0;
};

}  // namespace sinkattn::hopper
