// SPDX-License-Identifier: Apache-2.0
#include "hopper/kernels/combine.h"

#include <cmath>
#include <limits>

#include "hopper/device.h"
#include "hopper/kernels/element.cuh"

namespace sinkattn::hopper {
namespace {

constexpr int block_warps = 4;
constexpr int max_partials = 256;  // check_cache.cpp refuses more
constexpr float log2e = 1.4426950408889634f;
constexpr float ln2 = 0.6931471805599453f;
constexpr unsigned all_lanes = 0xffffffffu;

__device__ float warp_max(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    value = fmaxf(value, __shfl_xor_sync(all_lanes, value, step));
  }
  return value;
}

__device__ float warp_sum(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(all_lanes, value, step);
  return value;
}

/// exp(lse - top): 0 for -inf, 1 for the top itself, also where it is +inf.
__device__ float weight_of(float lse, float top) {
  if (lse == -INFINITY) return 0.0f;
  return lse == top ? 1.0f : exp2f((lse - top) * log2e);
}

/// One warp merges one (batch, row, head): first the weights of all partials, then column by
/// column.
__global__ void __launch_bounds__(32 * block_warps) combine_kernel(const CombineProblem p) {
  __shared__ float weights[block_warps][max_partials];
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * block_warps + warp;
  if (item >= p.batch * p.rows * p.heads) return;
  const std::int64_t head = item % p.heads;
  const std::int64_t row = item / p.heads % p.rows;
  const std::int64_t batch = item / p.heads / p.rows;

  const float* lse =
      static_cast<const float*>(p.lse_partial.data) + p.lse_partial.offset(batch, head, row);
  const float sink = load_sink(p.sink, head);
  float top = lane == 0 ? sink : -INFINITY;
  bool is_nan = isnan(sink);
  for (int n = lane; n < p.splits; n += 32) {
    const float x = lse[n * p.lse_partial_stride_split];
    is_nan |= isnan(x);
    top = fmaxf(top, x);
    weights[warp][n] = x;
  }
  is_nan = __any_sync(all_lanes, is_nan);
  top = warp_max(top);
  float total = lane == 0 ? weight_of(sink, top) : 0.0f;
  for (int n = lane; n < p.splits; n += 32) {
    const float weight = weight_of(weights[warp][n], top);
    weights[warp][n] = weight;
    total += weight;
  }
  total = warp_sum(total);
  __syncwarp();

  const float* from =
      static_cast<const float*>(p.out_partial.data) + p.out_partial.offset(batch, row, head);
  const float factor = is_nan ? NAN : (total == 0.0f ? 0.0f : 1.0f / total);
  const std::int64_t to = p.out.offset(batch, row, head);
  for (std::int64_t c = lane; c < p.head_dim_v; c += 32) {
    float sum = 0.0f;
#pragma unroll 4
    for (int n = 0; n < p.splits; ++n) {
      // A partial without weight is skipped, not multiplied by zero: it may hold NaN.
      const float x = from[n * p.out_partial_stride_split + c];
      const float weight = weights[warp][n];
      if (weight != 0.0f) sum = fmaf(weight, x, sum);
    }
    store_element(p.out.data, p.out.dtype, to + c, sum * factor);
  }
  if (lane != 0 || p.lse.data == nullptr) return;
  float merged = total == 0.0f ? -INFINITY : top + ln2 * log2f(total);
  if (is_nan) merged = NAN;
  static_cast<float*>(p.lse.data)[p.lse.offset(batch, head, row)] = merged;
}

}  // namespace

Status launch_combine(const CombineProblem& p, cudaStream_t stream) {
  const std::int64_t items = p.batch * p.rows * p.heads;
  const std::int64_t grid = (items + block_warps - 1) / block_warps;
  if (grid > std::numeric_limits<std::int32_t>::max()) {
    return Status::error(StatusCode::not_implemented,
                         "out_partial: expected fewer than 2^33 rows times heads, got more");
  }
  if (grid == 0) return {};
  combine_kernel<<<static_cast<unsigned>(grid), 32 * block_warps, 0, stream>>>(p);
  return launch_status("combine_kernel");
}

}  // namespace sinkattn::hopper
