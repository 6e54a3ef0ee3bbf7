// SPDX-License-Identifier: Apache-2.0
// Merge of a row tile whose pieces are the blocks of a cluster: every block leaves its result in its
// shared memory, and each finishes a share of the columns by reading all the others'. No workspace,
// no second launch.
#pragma once

#include <cstdint>

#include "hopper/core/decode_merge.cuh"
#include "hopper/ptx/cluster.cuh"
#include "hopper/ptx/mbarrier.cuh"

namespace sinkattn::hopper {

/// Result of one block, read by the others. Rows padded as in WarpResults.
template <int Rows, int ColumnsV>
struct BlockResult {
  float out[Rows][ColumnsV + 8];
  float top[Rows];
  float sum[Rows];
};

/// Sum over `width` neighbouring lanes (a power of two), in every one of them, in a fixed order.
__device__ inline float sum_lanes(float value, int width) {
  for (int step = width / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, step);
  }
  return value;
}

/// Four columns of one row: lane i of `width` lanes brings the part of block i.
template <int Rows, int ColumnsV>
__device__ MergedRow merge_blocks(const BlockResult<Rows, ColumnsV>& mine, int row, int column,
                                  int width, float scale_log2) {
  const std::uint32_t source = threadIdx.x % width;
  const auto remote = [&](const float* at) {
    return ptx::map_shared(ptx::shared_address(at), source);
  };
  const float top = ptx::load_cluster(remote(&mine.top[row]));
  const float sum = ptx::load_cluster(remote(&mine.sum[row]));
  const float4 part = ptx::load_cluster_4(remote(&mine.out[row][column]));
  MergedRow merged;
  merged.top = top;
  for (int step = width / 2; step > 0; step /= 2) {
    merged.top = fmaxf(merged.top, __shfl_xor_sync(0xffffffffu, merged.top, step));
  }
  const float factor = merge_factor(top, merged.top, scale_log2);
  merged.sum = sum_lanes(sum * factor, width);
  merged.out[0] = sum_lanes(part.x * factor, width);
  merged.out[1] = sum_lanes(part.y * factor, width);
  merged.out[2] = sum_lanes(part.z * factor, width);
  merged.out[3] = sum_lanes(part.w * factor, width);
  return merged;
}

/// By all threads of all blocks of the cluster, once `mine` is written.
template <class T, int Threads, int Rows, int ColumnsV>
__device__ void finish_in_cluster(const DecodeParams& p, const OutputRows& rows, int valid_rows,
                                  const BlockResult<Rows, ColumnsV>& mine) {
  ptx::cluster_sync();  // every block has written its result
  const int width = p.cluster;
  constexpr int items_of_row = ColumnsV / 4;
  const int items = valid_rows * items_of_row;
  const int groups = Threads / width;
  const int group = static_cast<int>(threadIdx.x) / width;
  // Items go round the blocks; all lanes of a warp stay for the shuffles.
  for (int base = 0; base * width < items; base += groups) {
    const int item = (base + group) * width + static_cast<int>(ptx::cluster_rank());
    const int safe = item < items ? item : 0;
    const int row = safe / items_of_row;
    const int column = safe % items_of_row * 4;
    const MergedRow merged =
        merge_blocks<Rows, ColumnsV>(mine, row, column, width, p.scale_log2);
    if (item < items && threadIdx.x % width == 0) finish_row<T>(p, rows, row, column, merged);
  }
  ptx::cluster_sync();  // nobody reads this block's memory any more
}

}  // namespace sinkattn::hopper
