// SPDX-License-Identifier: Apache-2.0
// From scores to P and dS in an accumulator fragment. A thread owns two rows (g and g + 8 of its
// warp's 16) and, in each group of 8 columns, two columns. In the key pass rows are keys and
// columns are queries, in the query pass the other way round.
#pragma once

#include <cstdint>

#include "hopper/core/backward_work.cuh"
#include "hopper/ptx/math.cuh"
#include "hopper/ptx/matrix.cuh"

namespace sinkattn::hopper {

/// A statistic (LSE2 or D') of the queries of a fragment: take(j) is the values for registers 4 j
/// to 4 j + 3, j ascending. Where queries are columns they lie in shared memory; a thread loads the
/// first `Window` of its groups ahead of the wait for what they are combined with, each other one
/// when a register pair becomes free.
template <int Groups, int Window>
struct ColumnStatistics {
  std::uint32_t address;  ///< the tile's statistic, moved to this thread's first column
  float2 values[Window];

  __device__ __forceinline__ explicit ColumnStatistics(std::uint32_t address_) : address(address_) {
#pragma unroll
    for (int j = 0; j < Window; ++j) values[j] = ptx::load_shared_float2(address + 32 * j);
  }

  __device__ __forceinline__ float4 take(int j) {
    const float2 x = values[j % Window];
    if (j + Window < Groups) {
      values[j % Window] = ptx::load_shared_float2(address + 32 * (j + Window));
    }
    return {x.x, x.y, x.x, x.y};
  }
};

/// Where queries are rows a thread has two of them.
struct RowStatistics {
  float low, high;

  __device__ float4 take(int) const { return {low, low, high, high}; }
};

/// tanh by ex2 and rcp: absolute error of a few 1e-7, also near 0, where the cap is the identity.
__device__ inline float tanh_accurate(float x) {
  constexpr float two_log2e = 2.8853900817779268f;
  const float e = ptx::exp2_approx(x * two_log2e);
  return fmaf(-2.0f, ptx::reciprocal_approx(e + 1.0f), 1.0f);
}

/// Raw scores -> P, in place.
template <class Statistics, int Registers>
__device__ __forceinline__ void probabilities(float (&s)[Registers], const BackwardArguments& args,
                                              Statistics& lse2) {
#pragma unroll
  for (int j = 0; j < Registers / 4; ++j) {
    const float4 lse = lse2.take(j);
    s[4 * j] = ptx::exp2_approx(fmaf(s[4 * j], args.score_scale, -lse.x));
    s[4 * j + 1] = ptx::exp2_approx(fmaf(s[4 * j + 1], args.score_scale, -lse.y));
    s[4 * j + 2] = ptx::exp2_approx(fmaf(s[4 * j + 2], args.score_scale, -lse.z));
    s[4 * j + 3] = ptx::exp2_approx(fmaf(s[4 * j + 3], args.score_scale, -lse.w));
  }
}

/// A wgmma wait has no operands, and ptxas moves it up over the arithmetic that should run ahead of
/// it, but not over a branch on the results. No probability has a sign (the NaN of ex2 has none).
template <int Registers>
__device__ __forceinline__ void hold_wait_below(const float (&p)[Registers]) {
  int bits = 0;
#pragma unroll
  for (int i = 0; i < Registers; ++i) bits |= __float_as_int(p[i]);
  if (bits < 0) __trap();
}

/// probabilities() with softcap, rounded and packed as operands: p is P, w is P (1 - (t / c)^2),
/// what dS is proportional to.
template <class T, class Statistics, int Blocks>
__device__ __forceinline__ void capped_probabilities(const float (&s)[8 * Blocks],
                                                     std::uint32_t (&p)[Blocks][4],
                                                     std::uint32_t (&w)[Blocks][4],
                                                     const BackwardArguments& args,
                                                     Statistics& lse2) {
#pragma unroll
  for (int j = 0; j < 2 * Blocks; ++j) {
    const float4 lse = lse2.take(j);
    const float shift[4] = {lse.x, lse.y, lse.z, lse.w};
    float weight[4], gradient[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float t = tanh_accurate(s[4 * j + i] * args.score_scale);
      weight[i] = ptx::exp2_approx(fmaf(t, args.score_cap, -shift[i]));
      gradient[i] = weight[i] * fmaf(-t, t, 1.0f);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = 2 * (j % 2) + half;
      p[j / 2][r] = ptx::pack<T>(weight[2 * half], weight[2 * half + 1]);
      w[j / 2][r] = ptx::pack<T>(gradient[2 * half], gradient[2 * half + 1]);
    }
  }
}

/// Which registers of a fragment are visible, bit i for register i: columns start at `column`, and
/// `rows` holds the intervals of visible columns of the warp's rows from this thread's first on.
template <int Registers>
__device__ __forceinline__ std::uint32_t visible_registers(const VisibleInterval* rows, int column,
                                                           int quad) {
  static_assert(Registers <= 32);
  std::uint32_t bits = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const VisibleInterval interval = rows[8 * half];
#pragma unroll
    for (int i = 2 * half; i < Registers; i += i % 2 == 0 ? 1 : 3) {
      bits |= interval.contains(column + 8 * (i / 4) + 2 * quad + i % 2) ? 1u << i : 0u;
    }
  }
  return bits;
}

/// Zeros the other elements of a packed operand; bitwise, because what it replaces may be NaN.
template <int Blocks>
__device__ __forceinline__ void keep_visible(std::uint32_t (&a)[Blocks][4], std::uint32_t visible) {
#pragma unroll
  for (int i = 0; i < 4 * Blocks; ++i) {
    const std::uint32_t low = visible >> (2 * i) & 1 ? 0x0000ffffu : 0;
    const std::uint32_t high = visible >> (2 * i + 1) & 1 ? 0xffff0000u : 0;
    a[i / 4][i % 4] &= low | high;
  }
}

/// dP -> dS in place, from P (fp32).
template <class Statistics, int Registers>
__device__ __forceinline__ void score_gradients(float (&dp)[Registers], const float (&p)[Registers],
                                                Statistics& softmax_d) {
#pragma unroll
  for (int j = 0; j < Registers / 4; ++j) {
    const float4 d = softmax_d.take(j);
    dp[4 * j] = p[4 * j] * (dp[4 * j] - d.x);
    dp[4 * j + 1] = p[4 * j + 1] * (dp[4 * j + 1] - d.y);
    dp[4 * j + 2] = p[4 * j + 2] * (dp[4 * j + 2] - d.z);
    dp[4 * j + 3] = p[4 * j + 3] * (dp[4 * j + 3] - d.w);
  }
}

template <class T>
__device__ float2 unpack(std::uint32_t pair);
template <>
__device__ inline float2 unpack<__nv_bfloat16>(std::uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
template <>
__device__ inline float2 unpack<__half>(std::uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

/// The same from P already rounded to T, packed as a register operand.
template <class T, class Statistics, int Blocks>
__device__ __forceinline__ void score_gradients(float (&dp)[8 * Blocks],
                                                const std::uint32_t (&p)[Blocks][4],
                                                Statistics& softmax_d) {
#pragma unroll
  for (int j = 0; j < 2 * Blocks; ++j) {
    const float4 d = softmax_d.take(j);
    const float2 low = unpack<T>(p[j / 2][2 * (j % 2)]);
    const float2 high = unpack<T>(p[j / 2][2 * (j % 2) + 1]);
    dp[4 * j] = low.x * (dp[4 * j] - d.x);
    dp[4 * j + 1] = low.y * (dp[4 * j + 1] - d.y);
    dp[4 * j + 2] = high.x * (dp[4 * j + 2] - d.z);
    dp[4 * j + 3] = high.y * (dp[4 * j + 3] - d.w);
  }
}

/// An accumulator as register operand A: k16 blocks of four registers.
template <class T, int Blocks>
__device__ __forceinline__ void pack_operand(std::uint32_t (&a)[Blocks][4],
                                             const float (&x)[8 * Blocks]) {
#pragma unroll
  for (int k = 0; k < Blocks; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[k][i] = ptx::pack<T>(x[8 * k + 2 * i], x[8 * k + 2 * i + 1]);
  }
}

}  // namespace sinkattn::hopper
