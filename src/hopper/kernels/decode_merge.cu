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

constexpr int row_warps = 2;   // that share the pieces of a row
constexpr int block_rows = 8;  // at a time
constexpr int block_threads = 32 * row_warps * block_rows;
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
__device__ MergedLse weigh(const DecodeMerge& p, const DecodeSlots& slots, int pieces, int row,
                           float sink, float* weights) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  float top = sink;
  bool is_nan = isnan(sink);
  for (int i = lane; i < pieces; i += 32) {
    const float lse = p.partial_lse[slots.of(i) * p.tile_rows + row];
    is_nan |= isnan(lse);
    top = fmaxf(top, lse);
    weights[i] = lse;
  }
  is_nan = __any_sync(all_lanes, is_nan);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(all_lanes, top, step));
  float total = 0.0f;
  for (int i = lane; i < pieces; i += 32) {
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

/// Where row `r` of a row tile lies in the output.
struct Output {
  std::int64_t batch, q;
  int head;
};

__device__ Output output_of(const DecodeMerge& p, const DecodeCut& cut, int r) {
  const int row = cut.first_row + r;
  return {p.packed_q ? 0 : cut.b, cut.first_q + row / p.group,
          cut.kv_head * p.group + row % p.group};
}

using Batch = float4[loads_in_flight];

/// Four columns of one row of the pieces first, first + step, .. below `pieces`; zeros past them.
__device__ void load_batch(const DecodeMerge& p, const DecodeSlots& slots, int pieces, int row,
                           int column, int first, int step, Batch& batch) {
  const float* from = p.partial_out + static_cast<std::int64_t>(row) * p.columns + column;
  const std::int64_t slot_size = static_cast<std::int64_t>(p.tile_rows) * p.columns;
#pragma unroll
  for (int j = 0; j < loads_in_flight; ++j) {
    const int i = first + j * step;
    batch[j] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (i < pieces && column < p.columns) {
      batch[j] = *reinterpret_cast<const float4*>(from + slots.of(i) * slot_size);
    }
  }
}

__device__ void add_batch(const Batch& batch, const float* weights, int pieces, int first, int step,
                          float4& sum) {
#pragma unroll
  for (int j = 0; j < loads_in_flight; ++j) {
    const int i = first + j * step;
    if (i >= pieces) continue;  // what was loaded ahead of the list is no number to rely on
    sum.x = fmaf(weights[i], batch[j].x, sum.x);
    sum.y = fmaf(weights[i], batch[j].y, sum.y);
    sum.z = fmaf(weights[i], batch[j].z, sum.z);
    sum.w = fmaf(weights[i], batch[j].w, sum.w);
  }
}

/// Weighted sum over the pieces first, first + step, ..; `batch` holds the first of them.
__device__ float4 sum_pieces(const DecodeMerge& p, const DecodeSlots& slots, int pieces, int row,
                             int column, const float* weights, int first, int step, Batch& batch) {
  float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
  add_batch(batch, weights, pieces, first, step, sum);
  for (int i = first + loads_in_flight * step; i < pieces; i += loads_in_flight * step) {
    load_batch(p, slots, pieces, row, column, i, step, batch);
    add_batch(batch, weights, pieces, i, step, sum);
  }
  return sum;
}

__device__ float4 add(const float4& a, const float4& b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

/// The value of the lane 16 away.
__device__ float4 swap_halves(const float4& a) {
  return {__shfl_xor_sync(all_lanes, a.x, 16), __shfl_xor_sync(all_lanes, a.y, 16),
          __shfl_xor_sync(all_lanes, a.z, 16), __shfl_xor_sync(all_lanes, a.w, 16)};
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

/// One block per entry of the list, two warps per row. With at most 64 columns the halves of a warp
/// share the pieces as well. Equal pieces (splits > 0) are nearly all to be merged: the first loads
/// start before the entry of the list is there.
__global__ void __launch_bounds__(block_threads, 2)
    decode_merge_kernel(const __grid_constant__ DecodeMerge p) {
  __shared__ float weights[row_warps * block_rows][decode_max_splits];
  __shared__ float4 exchange[block_rows][32];
  ptx::wait_for_previous_grid();
  ptx::launch_dependent_grids();
  const DecodeSlots slots(p.splits, static_cast<int>(blockIdx.x));
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int halves = p.columns <= 64 ? 2 : 1;
  const int lanes = 32 / halves;
  const int first = warp % row_warps * halves + lane / lanes;
  const int step = row_warps * halves;
  Batch batch;
  bool loaded = p.splits > 0;
  if (loaded) {
    load_batch(p, slots, p.splits, warp / row_warps, 4 * (lane % lanes), first, step, batch);
  }
  const DecodeCut cut = p.cuts[blockIdx.x];
  if (cut.pieces <= 1) return;
  for (int base = 0; base < cut.rows; base += block_rows) {
    const int r = base + warp / row_warps;
    const bool used = r < cut.rows;
    MergedLse merged = {};
#pragma unroll 1
    for (int from = 0; from < p.columns; from += 4 * lanes) {
      const int column = from + 4 * (lane % lanes);
      float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
      if (used) {
        if (!loaded) load_batch(p, slots, cut.pieces, r, column, first, step, batch);
        if (from == 0) {
          const float sink = load_sink(p.sink, output_of(p, cut, r).head);
          merged = weigh(p, slots, cut.pieces, r, sink, weights[warp]);
        }
        sum = sum_pieces(p, slots, cut.pieces, r, column, weights[warp], first, step, batch);
      }
      loaded = false;
      if (halves == 2) sum = add(sum, swap_halves(sum));
      if (warp % row_warps == 1) exchange[warp / row_warps][lane] = sum;
      __syncthreads();  // the second warp of each row has left its sum
      if (used && warp % row_warps == 0 && lane < lanes && column < p.head_dim_v) {
        sum = add(sum, exchange[warp / row_warps][lane]);
        const Output to = output_of(p, cut, r);
        store_columns(p, p.out.offset(to.batch, to.q, to.head) + column,
                      {sum.x * merged.factor, sum.y * merged.factor, sum.z * merged.factor,
                       sum.w * merged.factor});
      }
      __syncthreads();  // the sums are read
    }
    if (used && warp % row_warps == 0 && lane == 0 && p.lse.data != nullptr) {
      const Output to = output_of(p, cut, r);
      static_cast<float*>(p.lse.data)[p.lse.offset(to.batch, to.head, to.q)] = merged.lse;
    }
  }
}

}  // namespace

Status launch_decode_merge(const DecodeMerge& merge, int entries, cudaStream_t stream) {
  return launch_dependent("decode_merge_kernel", decode_merge_kernel,
                          LaunchSize{entries, block_threads}, stream, merge);
}

}  // namespace sinkattn::hopper
