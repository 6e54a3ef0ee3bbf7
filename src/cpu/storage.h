// SPDX-License-Identifier: Apache-2.0
// Where key tokens lie: dense, packed and paged storage behind one function.
#pragma once

#include <cstdint>

#include "common/problem.h"

namespace sinkattn::cpu {
namespace {

/// Element offset of (slot, head) for cache row `row`. Slots are below the clamped length, page
/// entries are clamped to the pages that exist.
inline std::int64_t slot_offset(const KeyStorage& keys, const HeadsTensor& tensor, std::int64_t row,
                                std::int64_t slot, std::int64_t head) {
  if (keys.page_table == nullptr) return tensor.offset(row, slot, head);
  const std::int64_t page = clamp_index(
      keys.page_table[row * keys.page_table_stride + slot / keys.page_size], 0, keys.num_pages - 1);
  return tensor.offset(page, slot % keys.page_size, head);
}

/// Keys of sequence b, resolved once per tile.
struct KeySequence {
  std::int64_t row = 0;    ///< cache row
  std::int64_t first = 0;  ///< slot of token 0
  std::int64_t length = 0;
};

inline KeySequence key_sequence(const AttentionShape& shape, const KeyStorage& keys,
                                std::int64_t b) {
  const SequenceInfo info = resolve_sequence(shape.side_k, b);
  return {keys.cache_row(b), info.first_row, info.length};
}

}  // namespace
}  // namespace sinkattn::cpu
