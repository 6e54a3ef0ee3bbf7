// SPDX-License-Identifier: Apache-2.0
// Merge of the row tiles that the decode kernel has cut into pieces of several blocks. The sink
// enters here, once, also where pieces are empty.
#include <cmath>

#include "hopper/decode_tuning.h"
#include "hopper/kernels/decode.h"
#include "hopper/kernels/element.cuh"
#include "hopper/launch_dependent.h"
#include "hopper/ptx/parameters.cuh"
#include "hopper/ptx/sync.cuh"

namespace sinkattn::hopper {
namespace {

constexpr int block_warps = 8;
constexpr int block_threads = 32 * block_warps;
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

/// LSE of the pieces lane, lane + 32, .. of a row.
template <int MostPieces>
using PieceLse = float[MostPieces / 32];

template <int MostPieces>
__device__ void load_lse(const DecodeMerge& p, const DecodeSlots& slots, int pieces, int row,
                         PieceLse<MostPieces>& lse) {
#pragma unroll
  for (int j = 0; j < MostPieces / 32; ++j) {
    const int i = static_cast<int>(threadIdx.x % 32) + 32 * j;
    lse[j] = i < pieces ? p.partial_lse[slots.of(i) * p.tile_rows + row] : -INFINITY;
  }
}

/// Weights of the pieces of a row into `weights`.
template <int MostPieces>
__device__ MergedLse weigh(PieceLse<MostPieces>& lse, int pieces, float sink, float* weights) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  float top = sink;
  bool is_nan = isnan(sink);
#pragma unroll
  for (int j = 0; j < MostPieces / 32; ++j) {
    if (lane + 32 * j >= pieces) lse[j] = -INFINITY;  // loaded ahead of the list
    is_nan |= isnan(lse[j]);
    top = fmaxf(top, lse[j]);
  }
  is_nan = __any_sync(all_lanes, is_nan);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(all_lanes, top, step));
  float total = 0.0f;
#pragma unroll
  for (int j = 0; j < MostPieces / 32; ++j) {
    const float weight = weight_of(lse[j], top);
    if (lane + 32 * j < pieces) weights[lane + 32 * j] = weight;
    total += weight;
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

/// Query head of row `r` of a row tile whose place in the list is known.
__device__ int head_of_unit(const DecodeMerge& p, int unit, int r) {
  const int row = unit / p.heads_kv % p.row_tiles * p.tile_rows + r;
  return unit % p.heads_kv * p.group + row % p.group;
}

/// Loads in flight of a lane, 16 bytes each.
template <int N>
using Batch = float4[N];

/// Four columns of one row of the pieces first, first + step, .. below `pieces`; zeros past them.
template <int N>
__device__ void load_batch(const DecodeMerge& p, const DecodeSlots& slots, int pieces, int row,
                           int column, int first, int step, Batch<N>& batch) {
  const float* from = p.partial_out + static_cast<std::int64_t>(row) * p.columns + column;
  const std::int64_t slot_size = static_cast<std::int64_t>(p.tile_rows) * p.columns;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const int i = first + j * step;
    batch[j] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (i < pieces && column < p.columns) {
      batch[j] = *reinterpret_cast<const float4*>(from + slots.of(i) * slot_size);
    }
  }
}

template <int N>
__device__ void add_batch(const Batch<N>& batch, const float* weights, int pieces, int first,
                          int step, float4& sum) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const int i = first + j * step;
    if (i >= pieces) continue;  // what was loaded ahead of the list is no number to rely on
    sum.x = fmaf(weights[i], batch[j].x, sum.x);
    sum.y = fmaf(weights[i], batch[j].y, sum.y);
    sum.z = fmaf(weights[i], batch[j].z, sum.z);
    sum.w = fmaf(weights[i], batch[j].w, sum.w);
  }
}

/// Weighted sum over the pieces first, first + step, ..; `batch` holds the first of them.
template <int N>
__device__ float4 sum_pieces(const DecodeMerge& p, const DecodeSlots& slots, int pieces, int row,
                             int column, const float* weights, int first, int step,
                             Batch<N>& batch) {
  float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
  add_batch(batch, weights, pieces, first, step, sum);
  for (int i = first + N * step; i < pieces; i += N * step) {
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

/// Block (entry of the list, rows of its row tile); `RowWarps` warps share the pieces of a row.
/// With at most 64 columns the halves of a warp share them as well. Equal pieces (splits > 0) are
/// nearly all to be merged: all loads start before the entry of the list is there.
template <int RowWarps, int MostPieces>
__global__ void __launch_bounds__(block_threads, 4)
    decode_merge_kernel(const __grid_constant__ DecodeMerge p) {
  __shared__ float weights[block_warps][MostPieces];
  __shared__ float4 exchange[block_warps][32];
  ptx::fetch_parameters(p);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int halves = p.columns <= 64 ? 2 : 1;
  const int lanes = 32 / halves;
  const int first = warp % RowWarps * halves + lane / lanes;
  const int step = RowWarps * halves;
  const int r = static_cast<int>(blockIdx.y) * (block_warps / RowWarps) + warp / RowWarps;
  Batch<RowWarps == 1 ? 4 : 8> batch;
  PieceLse<MostPieces> lse;
  const bool ahead = p.splits > 0;
  float sink = 0.0f;  // nothing that the decode kernel writes: it began behind all others
  if (p.by_unit) sink = load_sink(p.sink, head_of_unit(p, static_cast<int>(blockIdx.x), r));
  ptx::wait_for_previous_grid();
  ptx::launch_dependent_grids();
  if (ahead) {
    const DecodeSlots slots(p.splits, static_cast<int>(blockIdx.x));
    load_lse<MostPieces>(p, slots, p.splits, r, lse);
    load_batch(p, slots, p.splits, r, 4 * (lane % lanes), first, step, batch);
  }
  const DecodeCut cut = p.cuts[blockIdx.x];
  if (cut.pieces <= 1) return;
  const DecodeSlots slots(p.splits, cut.entry);
  const bool used = r < cut.rows;
  const Output to = output_of(p, cut, r);
  MergedLse merged = {};
  if (used) {
    if (!ahead) {
      load_lse<MostPieces>(p, slots, cut.pieces, r, lse);
      load_batch(p, slots, cut.pieces, r, 4 * (lane % lanes), first, step, batch);
    }
    if (!p.by_unit) sink = load_sink(p.sink, to.head);
    merged = weigh<MostPieces>(lse, cut.pieces, sink, weights[warp]);
  }
#pragma unroll 1
  for (int from = 0; from < p.columns; from += 4 * lanes) {
    const int column = from + 4 * (lane % lanes);
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
    if (used) {
      if (from > 0) load_batch(p, slots, cut.pieces, r, column, first, step, batch);
      sum = sum_pieces(p, slots, cut.pieces, r, column, weights[warp], first, step, batch);
    }
    if (halves == 2) sum = add(sum, swap_halves(sum));
    exchange[warp][lane] = sum;
    __syncthreads();  // all warps have left their sums
    if (used && warp % RowWarps == 0 && lane < lanes && column < p.head_dim_v) {
#pragma unroll
      for (int w = 1; w < RowWarps; ++w) sum = add(sum, exchange[warp + w][lane]);
      store_columns(p, p.out.offset(to.batch, to.q, to.head) + column,
                    {sum.x * merged.factor, sum.y * merged.factor, sum.z * merged.factor,
                     sum.w * merged.factor});
    }
    __syncthreads();  // the sums are read
  }
  if (used && warp % RowWarps == 0 && lane == 0 && p.lse.data != nullptr) {
    static_cast<float*>(p.lse.data)[p.lse.offset(to.batch, to.head, to.q)] = merged.lse;
  }
}

}  // namespace

Status launch_decode_merge(const DecodeMerge& merge, int entries, int rows, int pieces,
                           cudaStream_t stream) {
  const auto launch = [&](auto kernel, int row_warps) {
    const int block_rows = block_warps / row_warps;
    return launch_dependent(
        "decode_merge_kernel", kernel,
        LaunchSize{entries, block_threads, 0, (rows + block_rows - 1) / block_rows}, stream, merge);
  };
  return pieces > 8 ? launch(decode_merge_kernel<8, decode_max_splits>, 8)
                    : launch(decode_merge_kernel<1, decode_max_pieces>, 1);
}

}  // namespace sinkattn::hopper
