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

#include "sinkattn/params.h"

#if defined(__CUDACC__)
#define SINKATTN_HOST_DEVICE __host__ __device__
#else
// Always inlined on the host: these functions are also used by files compiled for one instruction
// set, and an out-of-line copy from there must never be the one that the linker keeps.
#define SINKATTN_HOST_DEVICE __attribute__((always_inline))
#endif

namespace sinkattn {

/// Half-open interval of keys or of query rows; empty iff begin >= end.
struct Range {
  std::int64_t begin = 0;
  std::int64_t end = 0;

  SINKATTN_HOST_DEVICE constexpr bool empty() const { return begin >= end; }
  SINKATTN_HOST_DEVICE constexpr std::int64_t size() const { return empty() ? 0 : end - begin; }
};

/// A normalised mask: causal is folded into right = 0, unlimited sides are -1.
struct Mask {
  std::int64_t left = -1;
  std::int64_t right = -1;
  std::int64_t chunk = 0;

  SINKATTN_HOST_DEVICE constexpr bool is_full() const {
    return left < 0 && right < 0 && chunk <= 0;
  }
};

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
SINKATTN_HOST_DEVICE constexpr std::int64_t floor_div(std::int64_t a, std::int64_t b) {
  return a >= 0 ? a / b : -((-a + b - 1) / b);
}

/// Keys visible to query row i of a sequence with sq rows and sk keys, clipped to [0, sk). Both
/// ends never decrease with i; an invisible row gives an empty range.
SINKATTN_HOST_DEVICE constexpr Range visible_keys(const Mask& mask, std::int64_t i, std::int64_t sq,
                                                  std::int64_t sk) {
  const std::int64_t p = i + sk - sq;
  std::int64_t begin = 0;
  std::int64_t end = sk;
  if (mask.left >= 0 && p - mask.left > begin) begin = p - mask.left;
  if (mask.right >= 0 && p + mask.right + 1 < end) end = p + mask.right + 1;
  if (mask.chunk > 0) {
    const std::int64_t first = floor_div(p, mask.chunk) * mask.chunk;
    if (first > begin) begin = first;
    if (first + mask.chunk < end) end = first + mask.chunk;
  }
  if (end < 0) end = 0;
  if (begin > sk) begin = sk;
  return {begin, end};
}

/// The definition itself, pair by pair; visible_keys() must agree with it (property test).
SINKATTN_HOST_DEVICE constexpr bool keep(const Mask& mask, std::int64_t i, std::int64_t j,
                                         std::int64_t sq, std::int64_t sk) {
  const std::int64_t p = i + sk - sq;
  if (j < 0 || j >= sk) return false;
  if (mask.left >= 0 && j < p - mask.left) return false;
  if (mask.right >= 0 && j - p > mask.right) return false;
  if (mask.chunk > 0 && floor_div(j, mask.chunk) != floor_div(p, mask.chunk)) return false;
  return true;
}

/// Query rows that see key j: the rows whose interval contains it, also one interval.
SINKATTN_HOST_DEVICE constexpr Range visible_queries(const Mask& mask, std::int64_t j,
                                                     std::int64_t sq, std::int64_t sk) {
  const std::int64_t shift = sq - sk;  // row = p + shift
  std::int64_t begin = 0;
  std::int64_t end = sq;
  if (j < 0 || j >= sk) return {0, 0};
  if (mask.right >= 0 && j - mask.right + shift > begin) begin = j - mask.right + shift;
  if (mask.left >= 0 && j + mask.left + 1 + shift < end) end = j + mask.left + 1 + shift;
  if (mask.chunk > 0) {
    const std::int64_t first = floor_div(j, mask.chunk) * mask.chunk + shift;
    if (first > begin) begin = first;
    if (first + mask.chunk < end) end = first + mask.chunk;
  }
  if (end < 0) end = 0;
  if (begin > sq) begin = sq;
  return {begin, end};
}

}  // namespace sinkattn
