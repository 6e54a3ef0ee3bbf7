// SPDX-License-Identifier: Apache-2.0
// Output rows that belong to no sequence: all rows are filled before the decode kernel writes those
// that do.
#include <cmath>
#include <limits>

#include "hopper/kernels/decode.h"
#include "hopper/kernels/element.cuh"
#include "hopper/launch_dependent.h"
#include "hopper/ptx/sync.cuh"

namespace sinkattn::hopper {
namespace {

constexpr int block_threads = 256;

/// One thread per 16 bytes of output; the first of a row writes its LSE.
__global__ void __launch_bounds__(block_threads) decode_fill_kernel(const DecodeFill p) {
  ptx::wait_for_previous_grid();
  ptx::launch_dependent_grids();  // they wait for this grid to end before they write
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * block_threads + threadIdx.x;
  const std::int64_t chunks = p.head_dim_v / 8;
  const std::int64_t head = i / chunks % p.heads;
  const std::int64_t row = i / chunks / p.heads % p.rows;
  const std::int64_t batch = i / chunks / p.heads / p.rows;
  if (batch >= p.batch) return;
  const std::int64_t chunk = i % chunks;
  char* to = static_cast<char*>(p.out.data) + 2 * (p.out.offset(batch, row, head) + 8 * chunk);
  *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
  if (chunk == 0 && p.lse.data != nullptr) {
    static_cast<float*>(p.lse.data)[p.lse.offset(batch, head, row)] = -INFINITY;
  }
}

}  // namespace

Status launch_decode_fill(const DecodeFill& fill, cudaStream_t stream) {
  const std::int64_t threads = fill.batch * fill.rows * fill.heads * (fill.head_dim_v / 8);
  const std::int64_t grid = (threads + block_threads - 1) / block_threads;
  if (grid == 0) return {};
  if (grid > std::numeric_limits<std::int32_t>::max()) {
    return Status::error(StatusCode::not_implemented,
                         "out: expected fewer than 2^42 elements, got more");
  }
  return launch_dependent("decode_fill_kernel", decode_fill_kernel,
                          LaunchSize{static_cast<int>(grid), block_threads}, stream, fill);
}

}  // namespace sinkattn::hopper
