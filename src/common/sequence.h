// SPDX-License-Identifier: Apache-2.0
// Where sequence b of a batch lies: rows, lengths, left padding. Host and device, one definition.
// All index tensors are untrusted; every value is clamped here so that nothing derived from a
// SequenceInfo can address memory outside the tensors.
#pragma once

#include <cstdint>

#include "common/mask.h"

namespace sinkattn {

/// One side (queries or keys) of a batch. Pointers are null when the argument was not given.
struct SequenceSide {
  const std::int32_t* cu_seqlens = nullptr;  ///< (b + 1,): packed
  const std::int32_t* seqused = nullptr;     ///< (b,)
  const std::int32_t* leftpad = nullptr;     ///< (b,), keys only
  std::int64_t capacity = 0;     ///< packed: total rows; dense: rows; paged: max_pages * page_size
  std::int64_t max_seqlen = -1;  ///< truncation bound of a packed sequence; -1 none
};

/// One sequence on one side. Token t of the sequence is row `first_row + t` of its (packed tensor |
/// batch entry | cache row).
template <class Int>
struct BasicSequenceInfo {
  Int first_row = 0;  ///< packed: cu_seqlens[b]; dense: leftpad (0 without)
  Int length = 0;     ///< tokens that take part
  Int extent = 0;     ///< rows that belong to the sequence, used or not
};
using SequenceInfo = BasicSequenceInfo<std::int64_t>;

template <class Int>
SINKATTN_HOST_DEVICE constexpr Int clamp(Int x, Int low, Int high) {
  return x < low ? low : (x > high ? high : x);
}

SINKATTN_HOST_DEVICE constexpr std::int64_t clamp_index(std::int64_t x, std::int64_t low,
                                                        std::int64_t high) {
  return clamp<std::int64_t>(x, low, high);
}

/// Int 32-bit where every capacity is below 2^31.
template <class Int = std::int64_t>
SINKATTN_HOST_DEVICE inline BasicSequenceInfo<Int> resolve_sequence(const SequenceSide& side,
                                                                    std::int64_t b) {
  BasicSequenceInfo<Int> info;
  const Int capacity = static_cast<Int>(side.capacity);
  info.extent = capacity;
  if (side.cu_seqlens != nullptr) {
    info.first_row = clamp<Int>(side.cu_seqlens[b], 0, capacity);
    info.extent = clamp<Int>(side.cu_seqlens[b + 1], info.first_row, capacity) - info.first_row;
  }
  info.length = info.extent;
  if (side.cu_seqlens != nullptr && side.max_seqlen >= 0 && info.length > side.max_seqlen) {
    info.length = static_cast<Int>(side.max_seqlen);
  }
  if (side.seqused != nullptr) info.length = clamp<Int>(side.seqused[b], 0, info.length);
  if (side.leftpad != nullptr) {
    const Int pad = clamp<Int>(side.leftpad[b], 0, info.length);
    info.first_row += pad;
    info.length -= pad;
  }
  return info;
}

}  // namespace sinkattn
