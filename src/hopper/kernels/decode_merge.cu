// SPDX-License-Identifier: Apache-2.0
// Merge of the row tiles that the decode kernel has cut into pieces of several blocks. The sink
// enters here, once, also where pieces are empty.
#include <cmath>

#include "hopper/decode_tuning.h"
#include "hopper/kernels/decode.h"
#include "hopper/kernels/element.cuh"
#include "hopper/launch_dependent.h"
#include "hopper/ptx/sync.cuh"

namespace sinkattn::hopper {
namespace {

constexpr int block_warps = 8;
constexpr int loads_in_flight = 8;  // of a lane, 16 bytes each
constexpr unsigned all_lanes = 0xffffffffu;
constexpr float log2e = 1.4426950408889634f;

/// exp(x - top): 0 for -inf, 1 for the top itself, also where it is +inf.
__device__ float weight_of(float x, float top) {
  if (x == -INFINITY) return 0.0f;
  return x == top ? 1.0f : exp2f((x - top) * log2e);
}

struct MergedLse {
  float lse, factor;  ///< factor: of the weighted sum
};

/// Weights of the pieces of a row into `weights`.
__device__ MergedLse weigh(const DecodeMerge& p, const DecodeCut& cut, int row, float sink,
                           float* weights) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  float top = sink;
  bool is_nan = isnan(sink);
  for (int i = lane; i < cut.pieces; i += 32) {
    const float lse = p.partial_lse[cut.slot(i) * p.tile_rows + row];
    is_nan |= isnan(lse);
    top = fmaxf(top, lse);
    weights[i] = lse;
  }
  is_nan = __any_sync(all_lanes, is_nan);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(all_lanes, top, step));
  float total = 0.0f;
  for (int i = lane; i < cut.pieces; i += 32) {
    weights[i] = weight_of(weights[i], top);
    total += weights[i];
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(all_lanes, total, step);
  __syncwarp();
  if (is_nan) return {NAN, NAN};
  if (total == 0.0f) return {sink, 0.0f};  // no keys: the sink to the bit
  total += weight_of(sink, top);
  return {top + logf(total), 1.0f / total};
}

/// Weighted sum of four columns over the pieces first, first + step, ..
__device__ float4 add_pieces(const DecodeMerge& p, const DecodeCut& cut, int row, int column,
                             const float* weights, int first, int step) {
  const float* from = p.partial_out + static_cast<std::int64_t>(row) * p.columns + column;
  const std::int64_t slot_size = static_cast<std::int64_t>(p.tile_rows) * p.columns;
  float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int base = first; base < cut.pieces; base += loads_in_flight * step) {
    float4 part[loads_in_flight];
    float weight[loads_in_flight];
#pragma unroll
    for (int j = 0; j < loads_in_flight; ++j) {
      const int i = base + j * step;
      part[j] = {0.0f, 0.0f, 0.0f, 0.0f};
      weight[j] = 0.0f;
      if (i < cut.pieces) {
        part[j] = *reinterpret_cast<const float4*>(from + cut.slot(i) * slot_size);
        weight[j] = weights[i];
      }
    }
#pragma unroll
    for (int j = 0; j < loads_in_flight; ++j) {
      sum.x = fmaf(weight[j], part[j].x, sum.x);
      sum.y = fmaf(weight[j], part[j].y, sum.y);
      sum.z = fmaf(weight[j], part[j].z, sum.z);
      sum.w = fmaf(weight[j], part[j].w, sum.w);
    }
  }
  return sum;
}

__device__ void store_columns(const DecodeMerge& p, std::int64_t at, const float4& x) {
  if (p.out.dtype == DType::bfloat16) {
    __nv_bfloat162 pair[2] = {__floats2bfloat162_rn(x.x, x.y), __floats2bfloat162_rn(x.z, x.w)};
    *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(p.out.data) + at) =
        *reinterpret_cast<uint2*>(pair);
  } else {
    __half2 pair[2] = {__floats2half2_rn(x.x, x.y), __floats2half2_rn(x.z, x.w)};
    *reinterpret_cast<uint2*>(static_cast<__half*>(p.out.data) + at) =
        *reinterpret_cast<uint2*>(pair);
  }
}

/// One block per entry of the list, one warp per row. With at most 64 columns the two halves of a
/// warp take every other piece.
__global__ void __launch_bounds__(32 * block_warps)
    decode_merge_kernel(const __grid_constant__ DecodeMerge p) {
  __shared__ float weights[block_warps][decode_max_splits];
  ptx::wait_for_previous_grid();
  ptx::launch_dependent_grids();
  const DecodeCut cut = p.cuts[blockIdx.x];
  if (cut.pieces <= 1) return;
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int halves = p.columns <= 64 ? 2 : 1;
  const int lanes = 32 / halves;
  for (int r = warp; r < cut.rows; r += block_warps) {
    const int row = cut.first_row + r;
    const int head = cut.kv_head * p.group + row % p.group;
    const std::int64_t q = cut.first_q + row / p.group;
    const std::int64_t batch = p.packed_q ? 0 : cut.b;
    const MergedLse merged = weigh(p, cut, r, load_sink(p.sink, head), weights[warp]);
    for (int column = 4 * (lane % lanes); column < p.columns; column += 4 * lanes) {
      float4 sum = add_pieces(p, cut, r, column, weights[warp], lane / lanes, halves);
      if (halves == 2) {
        sum.x += __shfl_xor_sync(all_lanes, sum.x, 16);
        sum.y += __shfl_xor_sync(all_lanes, sum.y, 16);
        sum.z += __shfl_xor_sync(all_lanes, sum.z, 16);
        sum.w += __shfl_xor_sync(all_lanes, sum.w, 16);
      }
      if (lane >= lanes || column >= p.head_dim_v) continue;
      sum = {sum.x * merged.factor, sum.y * merged.factor, sum.z * merged.factor,
             sum.w * merged.factor};
      store_columns(p, p.out.offset(batch, q, head) + column, sum);
    }
    if (lane == 0 && p.lse.data != nullptr) {
      static_cast<float*>(p.lse.data)[p.lse.offset(batch, head, q)] = merged.lse;
    }
    __syncwarp();  // the weights are free
  }
}

}  // namespace

Status launch_decode_merge(const DecodeMerge& merge, int entries, cudaStream_t stream) {
  return launch_dependent("decode_merge_kernel", decode_merge_kernel,
                          LaunchSize{entries, 32 * block_warps}, stream, merge);
}

}  // namespace sinkattn::hopper
