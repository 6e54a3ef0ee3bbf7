// SPDX-License-Identifier: Apache-2.0
// Online softmax over the accumulator of one warpgroup (64 rows), and how the sink enters it.
//
// A thread owns two rows (g and g + 8 of its warp's sixteen); the four threads of a quad share
// them. Units: raw scores s (before the scale); `scale_log2` = scale * log2(e) > 0.
#pragma once

#include <cmath>
#include <cstdint>

#include "hopper/ptx/math.cuh"

namespace sinkattn::hopper {

inline constexpr float log2e = 1.4426950408889634f;
inline constexpr float ln2 = 0.6931471805599453f;

/// Which of its two rows accumulator register i of a thread belongs to.
__device__ constexpr int row_of(int i) { return i / 2 % 2; }
/// Column of register i relative to the first column of the thread, 2 (thread % 4).
__device__ constexpr int column_of(int i) { return 8 * (i / 4) + i % 2; }

__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

/// Keys that a thread's two rows see, as intervals of key indices.
struct RowIntervals {
  int begin[2], end[2];
};

/// Scores outside the rows' intervals become -inf. `column` is the key of the thread's first
/// column. A select, not arithmetic: it also discards what a masked key made of NaN.
template <int Registers>
__device__ inline void mask_scores(float (&s)[Registers], int column, const RowIntervals& rows) {
  const int begin[2] = {rows.begin[0] - column, rows.begin[1] - column};
  const int end[2] = {rows.end[0] - column, rows.end[1] - column};
#pragma unroll
  for (int i = 0; i < Registers; ++i) {
    const int r = row_of(i), c = column_of(i);
    s[i] = c >= begin[r] && c < end[r] ? s[i] : -INFINITY;
  }
}

/// s -> cap tanh(s scale / cap), from one exponential and one reciprocal: the approximate tanh
/// instruction is wrong by up to 2^-11, which the LSE would show.
template <int Registers>
__device__ inline void cap_scores(float (&s)[Registers], float scale_over_cap, float cap) {
#pragma unroll
  for (int i = 0; i < Registers; ++i) {
    const float e = ptx::exp2_approx(s[i] * (2.0f * log2e * scale_over_cap));
    s[i] = cap - 2.0f * cap * ptx::reciprocal_approx(1.0f + e);
  }
}

/// Reference value of the exponentials (raw scores) and this thread's share of the running sum of
/// its two rows. The reference follows the running maximum only when that has grown by more than a
/// limit: exponentials up to 2^8 are as exact as those up to 1, and results computed before need
/// not be multiplied. (The idea is FlashAttention-4's, there for another GPU; here each row decides
/// for itself, so that a row's result does not depend on its neighbours.)
struct OnlineSoftmax {
  float maximum[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};

  /// Takes in the maxima of a block; returns what earlier results are to be multiplied by. A row's
  /// reference follows if its maximum has grown by more than the row's limit, in raw units.
  template <int Registers>
  __device__ inline void take_maximum(const float (&s)[Registers], float scale_log2,
                                      const float (&limit)[2], float (&rescale)[2]) {
    // Two chains per row hide the latency of max.
    float top[2][2] = {{s[0], s[1]}, {s[2], s[3]}};
#pragma unroll
    for (int i = 4; i < Registers; ++i) top[row_of(i)][i % 2] = fmaxf(top[row_of(i)][i % 2], s[i]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float previous = maximum[r];
      const float now = quad_max(fmaxf(top[r][0], top[r][1]));
      // From -inf the growth is infinite; -inf to -inf (NaN) is none.
      if (now - previous > limit[r]) maximum[r] = now;
      rescale[r] = ptx::exp2_approx((previous - subtrahend(r)) * scale_log2);
      if (maximum[r] == previous) rescale[r] = 1.0f;
      sum[r] *= rescale[r];
    }
  }

  /// Scores -> probabilities relative to the maximum, added to the sums.
  template <int Registers>
  __device__ inline void exponentiate(float (&s)[Registers], float scale_log2) {
    const float offset[2] = {-subtrahend(0) * scale_log2, -subtrahend(1) * scale_log2};
    float partial[2][2] = {};
#pragma unroll
    for (int i = 0; i < Registers; ++i) {
      s[i] = ptx::exp2_approx(fmaf(s[i], scale_log2, offset[row_of(i)]));
      partial[row_of(i)][i % 2] += s[i];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) sum[r] += partial[r][0] + partial[r][1];
  }

  /// Scores -> packed probabilities relative to the references as they stand, without a look at
  /// the maxima: a sum of this thread beyond `most` says afterwards that a reference was too low.
  /// The scores stay. True if the sums of all rows of the warp were taken. Otherwise none was, and
  /// `limit` is what take_maximum() needs: 0 for a row that must move, infinity for its neighbours.
  template <class T, int Registers, int Steps>
  __device__ inline bool keep_reference(const float (&s)[Registers], float scale_log2, float most,
                                        std::uint32_t (&p)[Steps][4], float (&limit)[2]) {
    // +inf for a row without a key so far: its exponentials are inf or NaN.
    const float offset[2] = {-maximum[0] * scale_log2, -maximum[1] * scale_log2};
    float partial[2][2] = {};
#pragma unroll
    for (int i = 0; i < Registers; i += 2) {
      const int r = row_of(i);
      const float even = ptx::exp2_approx(fmaf(s[i], scale_log2, offset[r]));
      const float odd = ptx::exp2_approx(fmaf(s[i + 1], scale_log2, offset[r]));
      partial[r][0] += even;
      partial[r][1] += odd;
      p[i / 8][i % 8 / 2] = ptx::pack<T>(even, odd);
    }
    const float block[2] = {partial[0][0] + partial[0][1], partial[1][0] + partial[1][1]};
    const bool kept[2] = {block[0] <= most, block[1] <= most};  // false for NaN
    if (__all_sync(0xffffffffu, kept[0] && kept[1])) {
      sum[0] += block[0];
      sum[1] += block[1];
      return true;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) limit[r] = quad_max(kept[r] ? 0.0f : 1.0f) > 0 ? 0.0f : INFINITY;
    return false;
  }

  /// The reference, or 0 while a row has seen no key: then every exponential is 0, not NaN.
  __device__ inline float subtrahend(int r) const {
    return maximum[r] == -INFINITY ? 0.0f : maximum[r];
  }
};

/// What a finished row's accumulator is multiplied by, and its LSE in natural log.
struct RowResult {
  float factor, lse;
};

/// Folds the sink in. Everything is compared in natural units with a new maximum: no finite sink,
/// however large or small against the scores, overflows, and +-inf work. `scale` > 0 turns raw
/// scores into natural ones; `sum` is the sum over the whole row.
__device__ inline RowResult finish_row(float maximum, float sum, float scale, float sink) {
  // No key (a row of NaN scores has a NaN sum): the sink is all there is.
  if (maximum == -INFINITY && sum == 0.0f) return {isnan(sink) ? NAN : 0.0f, sink};
  const float top_score = maximum * scale;
  const float top = fmaxf(top_score, sink);
  const float keep = top_score == top ? 1.0f : ptx::exp2_approx((top_score - top) * log2e);
  const float extra = sink == top ? 1.0f : ptx::exp2_approx((sink - top) * log2e);
  const float total = sum * keep + extra;
  return {keep / total, top + ln2 * __log2f(total)};
}

}  // namespace sinkattn::hopper
