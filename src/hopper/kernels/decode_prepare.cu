// SPDX-License-Identifier: Apache-2.0
// What has to be in memory before the decode kernel: arrival counters at zero (the workspace is the
// caller's and holds anything), and output rows that belong to no sequence.
#include <cmath>
#include <limits>

#include "hopper/kernels/decode.h"
#include "hopper/kernels/element.cuh"
#include "hopper/launch_dependent.h"
#include "hopper/ptx/sync.cuh"

namespace sinkattn::hopper {
namespace {

constexpr int block_threads = 256;

/// One thread per counter, then one per 16 bytes of output (the first of a row writes its LSE).
__global__ void __launch_bounds__(block_threads) decode_prepare_kernel(const DecodePrepare p) {
  ptx::wait_for_previous_grid();
  ptx::launch_dependent_grids();  // they wait for this grid to end before they use its results
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * block_threads + threadIdx.x;
  if (i < p.counters) p.arrivals[i] = 0;
  const std::int64_t chunks = p.head_dim_v / 8;
  const std::int64_t row_of_heads = i / chunks;
  const std::int64_t head = row_of_heads % p.heads;
  const std::int64_t row = row_of_heads / p.heads % p.rows;
  const std::int64_t batch = row_of_heads / p.heads / p.rows;
  if (p.out.data == nullptr || batch >= p.batch) return;
  const std::int64_t chunk = i % chunks;
  char* to = static_cast<char*>(p.out.data) + 2 * (p.out.offset(batch, row, head) + 8 * chunk);
  *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
  if (chunk == 0 && p.lse.data != nullptr) {
    static_cast<float*>(p.lse.data)[p.lse.offset(batch, head, row)] = -INFINITY;
  }
}

}  // namespace

Status launch_decode_prepare(const DecodePrepare& prepare, cudaStream_t stream) {
  std::int64_t threads = prepare.counters;
  if (prepare.out.data != nullptr) {
    const std::int64_t fill =
        prepare.batch * prepare.rows * prepare.heads * (prepare.head_dim_v / 8);
    if (fill > threads) threads = fill;
  }
  const std::int64_t grid = (threads + block_threads - 1) / block_threads;
  if (grid == 0) return {};
  if (grid > std::numeric_limits<std::int32_t>::max()) {
    return Status::error(StatusCode::not_implemented,
                         "out: expected fewer than 2^42 elements, got more");
  }
  return launch_dependent("decode_prepare_kernel", decode_prepare_kernel,
                          static_cast<unsigned>(grid), block_threads, 0, stream, prepare);
}

}  // namespace sinkattn::hopper
