// SPDX-License-Identifier: Apache-2.0
// The running softmax of one warp over packed query rows, on mma.sync fragments: scores, mask,
// rescale, P V. A warp holds all rows of the block's row tile; its keys come in steps.
#pragma once

#include <cstdint>

#include "common/mask.h"
#include "hopper/core/tile.cuh"
#include "hopper/kernels/decode.h"
#include "hopper/ptx/math.cuh"
#include "hopper/ptx/matrix.cuh"
#include "hopper/ptx/mma.cuh"

namespace sinkattn::hopper {

/// Address of the row and 16-byte chunk that this lane supplies to ldmatrix for a 16 x 16 block:
/// matrices (rows 0-7, columns 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15).
struct MatrixLane {
  std::uint32_t offset;
  __device__ MatrixLane() {
    const std::uint32_t lane = threadIdx.x % 32;
    offset = swizzled_offset(lane % 16, lane / 16);
  }
  /// Of the block at rows row (a multiple of 16) and columns 16 * step.
  template <class T>
  __device__ std::uint32_t at(std::uint32_t tile, int row, int step) const {
    // Chunk 2 * (step % 4) + lane / 16 only adds bits that the swizzle XORs.
    return tile + (step / 4) * T::slab_bytes + row * slab_row_bytes + (offset ^ (step % 4) * 32);
  }
};

/// The visible keys of this thread's two rows of a 16-row tile, clipped to the piece.
struct RowLimits {
  int begin[2], end[2];
};

template <class T, int RowTiles, int Columns, int ColumnsV, int Keys>
struct DecodeRows {
  static constexpr int steps = Columns / 16;  ///< k16 steps of Q K^T
  static constexpr int key_blocks = Keys / 16;
  // Q stays in registers where there is room; else its fragments are read again at every step.
  static constexpr bool keep_query = RowTiles * steps <= 8;
  using QueryTile = Tile<16 * RowTiles, Columns>;
  using KeyTile = Tile<Keys, Columns>;
  using ValueTile = Tile<Keys, ColumnsV>;

  MatrixLane lane;
  std::uint32_t query_tile;
  std::uint32_t query[keep_query ? RowTiles : 1][keep_query ? steps : 1][4];
  RowLimits limits[RowTiles];
  float out[RowTiles][ColumnsV / 8][4];
  float top[RowTiles][2];  ///< running maximum of the raw scores
  float sum[RowTiles][2];  ///< this thread's part of the row sum

  __device__ void start(std::uint32_t query_at) {
    query_tile = query_at;
#pragma unroll
    for (int m = 0; m < RowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        top[m][r] = -INFINITY;
        sum[m][r] = 0.0f;
      }
#pragma unroll
      for (int c = 0; c < ColumnsV / 8; ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[m][c][i] = 0.0f;
      }
      if constexpr (keep_query) {
#pragma unroll
        for (int k = 0; k < steps; ++k) {
          ptx::load_matrix_x4(query[m][k], lane.at<QueryTile>(query_tile, 16 * m, k));
        }
      }
    }
  }

  /// One ring slot: keys from token `key`. `inside`: every row sees every key of it.
  __device__ void attend(const DecodeParams& p, std::uint32_t key_tile, std::uint32_t value_tile,
                         int key, bool inside) {
    float scores[RowTiles][2 * key_blocks][4];
    multiply_keys(scores, key_tile);
    if (p.softcap > 0.0f) cap(p, scores);
    if (!inside) mask(scores, key);
    std::uint32_t weights[RowTiles][key_blocks][4];
#pragma unroll
    for (int m = 0; m < RowTiles; ++m) soften(p, m, scores[m], weights[m]);
    multiply_values(weights, value_tile);
  }

 private:
  using Scores = float[RowTiles][2 * key_blocks][4];

  __device__ void multiply_keys(Scores& scores, std::uint32_t key_tile) {
#pragma unroll
    for (int m = 0; m < RowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < 2 * key_blocks; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[m][n][i] = 0.0f;
      }
    }
#pragma unroll
    for (int k = 0; k < steps; ++k) {
      std::uint32_t fresh[RowTiles][4];
      if constexpr (!keep_query) {
#pragma unroll
        for (int m = 0; m < RowTiles; ++m) {
          ptx::load_matrix_x4(fresh[m], lane.at<QueryTile>(query_tile, 16 * m, k));
        }
      }
#pragma unroll
      for (int n = 0; n < key_blocks; ++n) {
        std::uint32_t b[4];
        ptx::load_matrix_x4(b, lane.at<KeyTile>(key_tile, 16 * n, k));
#pragma unroll
        for (int m = 0; m < RowTiles; ++m) {
          const auto& a = keep_query ? query[keep_query ? m : 0][keep_query ? k : 0] : fresh[m];
          ptx::mma_m16n8k16<T>(scores[m][2 * n], a, b[0], b[2]);
          ptx::mma_m16n8k16<T>(scores[m][2 * n + 1], a, b[1], b[3]);
        }
      }
    }
  }

  /// softcap * tanh(scale * score / softcap): natural units from here on.
  __device__ void cap(const DecodeParams& p, Scores& scores) {
#pragma unroll
    for (int m = 0; m < RowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < 2 * key_blocks; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float e = ptx::exp2_approx(scores[m][n][i] * p.softcap_in);
          scores[m][n][i] = p.softcap * (1.0f - 2.0f * ptx::reciprocal_approx(e + 1.0f));
        }
      }
    }
  }

  /// A select, so that a NaN score of an invisible key disappears too.
  __device__ void mask(Scores& scores, int key) {
    const int column = key + 2 * static_cast<int>(threadIdx.x % 4);
#pragma unroll
    for (int m = 0; m < RowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < 2 * key_blocks; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = column + 8 * n + i % 2;
          const bool visible = at >= limits[m].begin[i / 2] && at < limits[m].end[i / 2];
          if (!visible) scores[m][n][i] = -INFINITY;
        }
      }
    }
  }

  /// New maximum, rescale of what was summed so far, and exp2 of the scores as an A operand.
  __device__ void soften(const DecodeParams& p, int m, float (&scores)[2 * key_blocks][4],
                         std::uint32_t (&weights)[key_blocks][4]) {
    float shift[2];
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float high = fmaxf(scores[0][2 * r], scores[0][2 * r + 1]);
#pragma unroll
      for (int n = 1; n < 2 * key_blocks; ++n) {
        high = fmaxf(high, fmaxf(scores[n][2 * r], scores[n][2 * r + 1]));
      }
      high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 1));
      high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 2));
      high = fmaxf(high, top[m][r]);
      // No key seen yet: any finite shift makes all weights 0.
      shift[r] = high == -INFINITY ? 0.0f : high * p.scale_log2;
      factor[r] = ptx::exp2_approx(top[m][r] * p.scale_log2 - shift[r]);
      top[m][r] = high;
    }
    if (__any_sync(0xffffffffu, factor[0] != 1.0f || factor[1] != 1.0f)) rescale(m, factor);
#pragma unroll
    for (int n = 0; n < 2 * key_blocks; ++n) {
      float w[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        w[i] = ptx::exp2_approx(fmaf(scores[n][i], p.scale_log2, -shift[i / 2]));
        sum[m][i / 2] += w[i];
      }
      weights[n / 2][2 * (n % 2)] = ptx::pack<T>(w[0], w[1]);
      weights[n / 2][2 * (n % 2) + 1] = ptx::pack<T>(w[2], w[3]);
    }
  }

  __device__ void rescale(int m, const float (&factor)[2]) {
    sum[m][0] *= factor[0];
    sum[m][1] *= factor[1];
#pragma unroll
    for (int c = 0; c < ColumnsV / 8; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[m][c][i] *= factor[i / 2];
    }
  }

  __device__ void multiply_values(const std::uint32_t (&weights)[RowTiles][key_blocks][4],
                                  std::uint32_t value_tile) {
#pragma unroll
    for (int n = 0; n < key_blocks; ++n) {
#pragma unroll
      for (int c = 0; c < ColumnsV / 16; ++c) {
        std::uint32_t b[4];
        ptx::load_matrix_x4_transposed(b, lane.at<ValueTile>(value_tile, 16 * n, c));
#pragma unroll
        for (int m = 0; m < RowTiles; ++m) {
          ptx::mma_m16n8k16<T>(out[m][2 * c], weights[m][n], b[0], b[1]);
          ptx::mma_m16n8k16<T>(out[m][2 * c + 1], weights[m][n], b[2], b[3]);
        }
      }
    }
  }
};

}  // namespace sinkattn::hopper
