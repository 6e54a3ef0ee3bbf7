// SPDX-License-Identifier: Apache-2.0
// From the partial results of warps to an output row: merge of the warps of a block in shared
// memory, then either the end of the row (sink included), or a piece in the workspace. The sink is
// counted in finish_row() and in the merge of pieces (kernels/decode_merge.cu), of which every row
// passes exactly one.
#pragma once

#include <cmath>
#include <cstdint>

#include "hopper/core/decode_work.cuh"
#include "hopper/kernels/element.cuh"
#include "hopper/ptx/math.cuh"

namespace sinkattn::hopper {

inline constexpr float decode_log2e = 1.4426950408889634f;

/// exp(x - top) for x <= top in natural units; exactly 1 for the top itself, also where it is
/// infinite. Subtracted before the change of base: values near the end of fp32 must not overflow.
__device__ inline float weight_below(float x, float top) {
  return x == top ? 1.0f : exp2f((x - top) * decode_log2e);
}

/// Results of the warps in shared memory. Rows are padded by 8 floats: the eight rows that a warp
/// stores at once fall into different banks.
template <int Warps, int Rows, int ColumnsV>
struct WarpResults {
  float out[Warps][Rows][ColumnsV + 8];
  float top[Warps][Rows];  ///< raw scores
  float sum[Warps][Rows];
};

/// Four columns of one row after the merge of the warps.
struct MergedRow {
  float top = -INFINITY;  ///< raw scores
  float sum = 0.0f;
  float out[4] = {};
};

/// Weight of a partial result with maximum `top` in one with maximum `merged` (raw scores). Without
/// keys the sum is 0 and the columns are 0; with NaN scores alone the sum is NaN: both times 0.
__device__ inline float merge_factor(float top, float merged, float scale_log2) {
  if (top == -INFINITY) return 0.0f;
  return top == merged ? 1.0f : ptx::exp2_approx((top - merged) * scale_log2);
}

template <int Warps, int Rows, int ColumnsV>
__device__ MergedRow merge_warps(const WarpResults<Warps, Rows, ColumnsV>& results, int row,
                                 int column, float scale_log2) {
  MergedRow merged;
#pragma unroll
  for (int w = 0; w < Warps; ++w) merged.top = fmaxf(merged.top, results.top[w][row]);
#pragma unroll
  for (int w = 0; w < Warps; ++w) {
    const float factor = merge_factor(results.top[w][row], merged.top, scale_log2);
    merged.sum += results.sum[w][row] * factor;
    const float4 part = *reinterpret_cast<const float4*>(&results.out[w][row][column]);
    merged.out[0] += part.x * factor;
    merged.out[1] += part.y * factor;
    merged.out[2] += part.z * factor;
    merged.out[3] += part.w * factor;
  }
  return merged;
}

/// Where the packed rows of a piece lie in the output.
struct OutputRows {
  std::int64_t batch, first_q;
  int first_row, kv_head;

  __device__ int position(const DecodeParams& p, int row) const {
    return p.by_group.divide(first_row + row);
  }
  __device__ int head(const DecodeParams& p, int row) const {
    return kv_head * p.group + (first_row + row) - position(p, row) * p.group;
  }
};

template <class T>
__device__ void store_row(const DecodeParams& p, const OutputRows& rows, int row, int column,
                          const float (&out)[4], float lse) {
  const std::int64_t q = rows.first_q + rows.position(p, row);
  const int head = rows.head(p, row);
  if (column < p.head_dim_v) {
    T* to = static_cast<T*>(p.out.data) + p.out.offset(rows.batch, q, head) + column;
    *reinterpret_cast<uint2*>(to) =
        make_uint2(ptx::pack<T>(out[0], out[1]), ptx::pack<T>(out[2], out[3]));
  }
  if (column == 0 && p.lse.data != nullptr) {
    static_cast<float*>(p.lse.data)[p.lse.offset(rows.batch, head, q)] = lse;
  }
}

/// End of a row that one block has done alone: the sink enters.
template <class T>
__device__ void finish_row(const DecodeParams& p, const OutputRows& rows, int row, int column,
                           MergedRow merged) {
  const float sink = load_sink(p.sink, rows.head(p, row));
  float lse = sink;  // no key: the sink to the bit
  float factor = isnan(sink) ? NAN : 0.0f;
  if (merged.top != -INFINITY || merged.sum != 0.0f) {
    const float top = merged.top * p.scale;
    const float high = isnan(sink) ? sink : fmaxf(top, sink);
    const float own = weight_below(top, high);
    const float total = merged.sum * own + weight_below(sink, high);
    factor = own / total;
    lse = high + logf(total);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) merged.out[i] *= factor;
  store_row<T>(p, rows, row, column, merged.out, lse);
}

/// A piece of a row: normalised, without the sink.
template <int Rows, int ColumnsV>
__device__ void store_piece(const DecodeParams& p, std::int64_t slot, int row, int column,
                            const MergedRow& merged) {
  const bool empty = merged.top == -INFINITY && merged.sum == 0.0f;
  const float factor = empty ? 0.0f : 1.0f / merged.sum;
  float4 out = {0.0f, 0.0f, 0.0f, 0.0f};
  if (!empty) {
    out = {merged.out[0] * factor, merged.out[1] * factor, merged.out[2] * factor,
           merged.out[3] * factor};
  }
  const std::int64_t at = slot * Rows + row;
  *reinterpret_cast<float4*>(p.partial_out + at * ColumnsV + column) = out;
  if (column == 0) {
    p.partial_lse[at] = empty ? -INFINITY : merged.top * p.scale + logf(merged.sum);
  }
}

}  // namespace sinkattn::hopper
