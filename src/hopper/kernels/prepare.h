// SPDX-License-Identifier: Apache-2.0
// The backward's prepare pass: everything about a query row that the main pass needs, and dsink.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "common/problem.h"
#include "sinkattn/status.h"

namespace sinkattn::hopper {

/// Rows per block, and the multiple that row statistics are padded to per sequence.
inline constexpr std::int64_t prepare_tile_rows = 128;

/// Row statistics in the workspace, fp32: (b, h, padded rows), or packed (h, padded total) where
/// the rows of sequence i start at padded_row(cu_seqlens[i], i). Padding rows hold LSE +inf and D'
/// 0, so that P and dS computed from them are 0.
struct PrepareLayout {
  std::int64_t rows;           ///< padded rows of one head (of one batch entry where dense)
  std::int64_t tiles;          ///< row tiles of the longest sequence
  std::int64_t blocks;         ///< partial sums of dsink per head
  std::size_t lse2_offset;     ///< LSE * log2(e); 0 where the LSE is -inf (scores are -inf there)
  std::size_t d_offset;        ///< D' = rowsum(dout * out) - dlse
  std::size_t partial_offset;  ///< (h, blocks)
  std::size_t bytes;

  explicit PrepareLayout(const BackwardProblem& problem);

  static SINKATTN_HOST_DEVICE constexpr std::int64_t padded_row(std::int64_t first_row,
                                                                std::int64_t b) {
    return (first_row + b * prepare_tile_rows) / prepare_tile_rows * prepare_tile_rows;
  }
};

/// The accumulator of dQ, which the pass fills with zeros tile by tile: (.., rows, columns) fp32 in
/// the row order of the statistics, and a counter per backward_tile_queries rows. data null: none.
struct PrepareAccumulator {
  float* data = nullptr;
  int* turns = nullptr;  ///< may be null alone
  int columns = 0;
};

/// Launches the pass and the fixed-order reduction of dsink on `stream`.
Status launch_prepare(const BackwardProblem& problem, void* workspace,
                      const PrepareAccumulator& accumulator, cudaStream_t stream);

}  // namespace sinkattn::hopper
