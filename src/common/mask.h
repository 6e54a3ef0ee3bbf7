// SPDX-License-Identifier: Apache-2.0
// Visibility: the one definition of which keys a query row sees. Host and device.
//
// With p = i + sk - sq (row i, 0-based, aligned to the bottom right), key j is visible iff
//   0 <= j < sk, causal: j <= p, left >= 0: j >= p - left, right >= 0: j <= p + right,
//   chunk c > 0: floor(j / c) == floor(p / c).
// Each condition is an interval in j whose ends never decrease with i. So the visible keys of a row
// are ONE interval, both of its ends are monotone in the row, and everything that schedules blocks
// follows from the ends of the first and the last row (schedule.h).
#pragma once

#include <cstdint>
#include <type_traits>

#include "sinkattn/params.h"

#if defined(__CUDACC__)
#define SINKATTN_HOST_DEVICE __host__ __device__
#else
// Always inlined on the host: these functions are also used by files compiled for one instruction
// set, and an out-of-line copy from there must never be the one that the linker keeps.
#define SINKATTN_HOST_DEVICE __attribute__((always_inline))
#endif

namespace sinkattn {

// Everything here is a template of the integer type: 64 bits for the host and the oracle, 32 bits
// for kernels, whose producer warps live on 24 registers (narrow_mask()).

/// Int, without taking part in template argument deduction: the mask decides.
template <class Int>
using Same = std::type_identity_t<Int>;

/// Half-open interval of keys or of query rows; empty iff begin >= end.
template <class Int>
struct BasicRange {
  Int begin = 0;
  Int end = 0;

  SINKATTN_HOST_DEVICE constexpr bool empty() const { return begin >= end; }
  SINKATTN_HOST_DEVICE constexpr Int size() const { return empty() ? 0 : end - begin; }
};
using Range = BasicRange<std::int64_t>;

/// A normalised mask: causal is folded into right = 0, unlimited sides are -1.
template <class Int>
struct BasicMask {
  Int left = -1;
  Int right = -1;
  Int chunk = 0;

  SINKATTN_HOST_DEVICE constexpr bool is_full() const {
    return left < 0 && right < 0 && chunk <= 0;
  }
};
using Mask = BasicMask<std::int64_t>;
using Mask32 = BasicMask<std::int32_t>;

/// Longest sequence for which 32-bit masks are exact: no sum below overflows.
inline constexpr std::int64_t longest_32_bit = (std::int64_t{1} << 30) - 1;

/// The same mask for sequences of at most longest_32_bit tokens.
SINKATTN_HOST_DEVICE constexpr Mask32 narrow_mask(const Mask& mask) {
  const auto narrow = [](std::int64_t x) {
    return static_cast<std::int32_t>(x > longest_32_bit ? longest_32_bit : x);
  };
  Mask32 result;
  // A side that reaches over every sequence is unlimited.
  result.left = mask.left > longest_32_bit ? -1 : narrow(mask.left);
  result.right = mask.right > longest_32_bit ? -1 : narrow(mask.right);
  result.chunk = narrow(mask.chunk);
  return result;
}

/// Windows and chunks at least this long reach over any sequence (and would overflow below).
inline constexpr std::int64_t unlimited_extent = std::int64_t{1} << 40;

/// Folds causal into the window: causal forces the right side to 0.
SINKATTN_HOST_DEVICE constexpr Mask make_mask(const MaskParams& params) {
  const auto side = [](std::int64_t width) {
    return width < 0 || width >= unlimited_extent ? std::int64_t{-1} : width;
  };
  Mask mask;
  mask.left = side(params.window_left);
  mask.right = params.causal ? 0 : side(params.window_right);
  mask.chunk = params.attention_chunk < 0 ? 0 : params.attention_chunk;
  if (mask.chunk > unlimited_extent) mask.chunk = unlimited_extent;
  return mask;
}

/// floor(a / b) for b > 0 and any sign of a.
template <class Int = std::int64_t>
SINKATTN_HOST_DEVICE constexpr Int floor_div(Int a, Same<Int> b) {
  return a >= 0 ? a / b : -((-a + b - 1) / b);
}

/// Keys visible to query row i of a sequence with sq rows and sk keys, clipped to [0, sk). Both
/// ends never decrease with i; an invisible row gives an empty range.
template <class Int = std::int64_t>
SINKATTN_HOST_DEVICE constexpr BasicRange<Int> visible_keys(const BasicMask<Int>& mask, Same<Int> i,
                                                            Same<Int> sq, Same<Int> sk) {
  const Int p = i + sk - sq;
  Int begin = 0;
  Int end = sk;
  if (mask.left >= 0 && p - mask.left > begin) begin = p - mask.left;
  if (mask.right >= 0 && p + mask.right + 1 < end) end = p + mask.right + 1;
  if (mask.chunk > 0) {
    const Int first = floor_div(p, mask.chunk) * mask.chunk;
    if (first > begin) begin = first;
    if (first + mask.chunk < end) end = first + mask.chunk;
  }
  if (end < 0) end = 0;
  if (begin > sk) begin = sk;
  return {begin, end};
}

/// The definition itself, pair by pair; visible_keys() must agree with it (property test).
template <class Int = std::int64_t>
SINKATTN_HOST_DEVICE constexpr bool keep(const BasicMask<Int>& mask, Same<Int> i, Same<Int> j,
                                         Same<Int> sq, Same<Int> sk) {
  const Int p = i + sk - sq;
  if (j < 0 || j >= sk) return false;
  if (mask.left >= 0 && j < p - mask.left) return false;
  if (mask.right >= 0 && j - p > mask.right) return false;
  if (mask.chunk > 0 && floor_div(j, mask.chunk) != floor_div(p, mask.chunk)) return false;
  return true;
}

/// Query rows that see key j: the rows whose interval contains it, also one interval.
template <class Int = std::int64_t>
SINKATTN_HOST_DEVICE constexpr BasicRange<Int> visible_queries(const BasicMask<Int>& mask,
                                                               Same<Int> j, Same<Int> sq,
                                                               Same<Int> sk) {
  const Int shift = sq - sk;  // row = p + shift
  Int begin = 0;
  Int end = sq;
  if (j < 0 || j >= sk) return {0, 0};
  if (mask.right >= 0 && j - mask.right + shift > begin) begin = j - mask.right + shift;
  if (mask.left >= 0 && j + mask.left + 1 + shift < end) end = j + mask.left + 1 + shift;
  if (mask.chunk > 0) {
    const Int first = floor_div(j, mask.chunk) * mask.chunk + shift;
    if (first > begin) begin = first;
    if (first + mask.chunk < end) end = first + mask.chunk;
  }
  if (end < 0) end = 0;
  if (begin > sq) begin = sq;
  return {begin, end};
}

}  // namespace sinkattn
