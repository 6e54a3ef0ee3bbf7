// SPDX-License-Identifier: Apache-2.0
#include "hopper/kernels/unused_rows.h"

#include "hopper/core/scheduler.cuh"
#include "hopper/device.h"

namespace sinkattn::hopper {
namespace {

constexpr int block_threads = 128;

struct UnusedRowsArguments {
  HeadsTensor out;
  RowsTensor lse;
  SequenceSide side;
  int sequences, heads, head_dim_v;
  bool packed;
};

/// One block per sequence (packed: and one for the rows before the first, one for those after the
/// last); a warp per row and head.
__global__ void __launch_bounds__(block_threads)
    clear_unused_rows_kernel(const UnusedRowsArguments a) {
  const int b = blockIdx.x;
  const BasicSequenceInfo<int> sequence =
      a.packed ? packed_sequence(a.side, b, a.sequences) : resolve_sequence<int>(a.side, b);
  const int batch = a.packed ? 0 : b;
  const int lane = threadIdx.x % 32;
  const std::int64_t items = std::int64_t{sequence.extent - sequence.length} * a.heads;
  for (std::int64_t i = threadIdx.x / 32; i < items; i += block_threads / 32) {
    const std::int64_t row = sequence.first_row + sequence.length + i / a.heads;
    const std::int64_t head = i % a.heads;
    auto* out = static_cast<std::uint16_t*>(a.out.data) + a.out.offset(batch, row, head);
    for (int c = lane; c < a.head_dim_v; c += 32) out[c] = 0;
    if (lane == 0 && a.lse.data != nullptr) {
      static_cast<float*>(a.lse.data)[a.lse.offset(batch, head, row)] = -INFINITY;
    }
  }
}

}  // namespace

Status launch_clear_unused_rows(const ForwardProblem& problem, cudaStream_t stream) {
  const UnusedRowsArguments arguments{problem.out,
                                      problem.lse,
                                      problem.side_q,
                                      static_cast<int>(problem.batch),
                                      static_cast<int>(problem.heads_q),
                                      static_cast<int>(problem.head_dim_v),
                                      problem.packed_q};
  const auto grid = static_cast<unsigned>(problem.batch + (problem.packed_q ? 2 : 0));
  if (grid == 0) return {};
  clear_unused_rows_kernel<<<grid, block_threads, 0, stream>>>(arguments);
  return launch_status("clear_unused_rows_kernel");
}

}  // namespace sinkattn::hopper
