// SPDX-License-Identifier: Apache-2.0
// Block ranges against the definition of visibility, pair by pair, exhaustively for small sizes.
#include <gtest/gtest.h>

#include <set>
#include <utility>
#include <vector>

#include "common/schedule.h"

namespace sinkattn {
namespace {

struct Case {
  Mask mask;
  std::int64_t sq, sk;
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << "left " << c.mask.left << " right " << c.mask.right << " chunk " << c.mask.chunk
             << " sq " << c.sq << " sk " << c.sk;
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (std::int64_t left : {-1, 0, 1, 3, 8, 100}) {
    for (std::int64_t right : {-1, 0, 2, 5, 100}) {
      for (std::int64_t chunk : {0, 1, 3, 7, 100}) {
        for (std::int64_t sq : {0, 1, 2, 3, 5, 8, 13}) {
          for (std::int64_t sk : {0, 1, 2, 4, 7, 8, 14})
            all.push_back({{left, right, chunk}, sq, sk});
        }
      }
    }
  }
  return all;
}

constexpr std::int64_t tiles[] = {1, 2, 3, 4, 8, 32};

/// How often each pair of a case is visited. Rows and keys beyond the sequence never are.
class Visits {
 public:
  explicit Visits(const Case& c) : c_(c), count_(static_cast<std::size_t>(c.sq * c.sk)) {}

  /// One block of a kernel's loop: rows x keys, with or without a mask.
  void block(const Range& rows, const Range& keys, bool masked) {
    for (std::int64_t i = rows.begin; i < rows.end && i < c_.sq; ++i) {
      for (std::int64_t j = keys.begin; j < keys.end; ++j) {
        const bool visible = keep(c_.mask, i, j, c_.sq, c_.sk);
        if (!masked) {
          ASSERT_TRUE(visible) << c_ << " row " << i << " key " << j << " is called unmasked";
        }
        if (visible) ++count_[static_cast<std::size_t>(i * c_.sk + j)];
      }
    }
  }

  void expect_every_visible_pair_once() const {
    for (std::int64_t i = 0; i < c_.sq; ++i) {
      for (std::int64_t j = 0; j < c_.sk; ++j) {
        ASSERT_EQ(count_[static_cast<std::size_t>(i * c_.sk + j)],
                  keep(c_.mask, i, j, c_.sq, c_.sk) ? 1 : 0)
            << c_ << " row " << i << " key " << j;
      }
    }
  }

 private:
  Case c_;
  std::vector<int> count_;
};

bool any_visible(const Case& c, const Range& rows, const Range& keys) {
  for (std::int64_t i = rows.begin; i < rows.end && i < c.sq; ++i) {
    for (std::int64_t j = keys.begin; j < keys.end; ++j) {
      if (keep(c.mask, i, j, c.sq, c.sk)) return true;
    }
  }
  return false;
}

bool all_visible(const Case& c, const Range& rows, const Range& keys) {
  for (std::int64_t i = rows.begin; i < rows.end && i < c.sq; ++i) {
    for (std::int64_t j = keys.begin; j < keys.end; ++j) {
      if (!keep(c.mask, i, j, c.sq, c.sk)) return false;
    }
  }
  return true;
}

Range block_of(std::int64_t index, std::int64_t tile) { return {index * tile, (index + 1) * tile}; }

TEST(Schedule, KeyBlocksCoverEveryVisiblePairOnce) {
  for (const Case& c : cases()) {
    for (std::int64_t tile_m : tiles) {
      for (std::int64_t tile_n : tiles) {
        Visits visits(c);
        for (std::int64_t m = 0; m < ceil_div(c.sq, tile_m); ++m) {
          const Range rows = block_of(m, tile_m);
          const KeyBlocks b = key_blocks(c.mask, rows.begin, rows.end, c.sq, c.sk, tile_n);
          ASSERT_LE(0, b.n_begin) << c;
          ASSERT_LE(b.n_begin, b.n_full_begin) << c;
          ASSERT_LE(b.n_full_begin, b.n_full_end) << c;
          ASSERT_LE(b.n_full_end, b.n_end) << c;
          ASSERT_LE(b.n_end, ceil_div(c.sk, tile_n)) << c;
          for (std::int64_t n = b.n_begin; n < b.n_end; ++n) {
            const bool masked = n < b.n_full_begin || n >= b.n_full_end;
            visits.block(rows, block_of(n, tile_n), masked);
            // No wasted work: every visited block has something visible, and every block that
            // needs no mask is called unmasked.
            ASSERT_TRUE(any_visible(c, rows, block_of(n, tile_n))) << c << " block " << n;
            ASSERT_EQ(masked, !all_visible(c, rows, block_of(n, tile_n))) << c << " block " << n;
          }
        }
        visits.expect_every_visible_pair_once();
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST(Schedule, QueryBlocksCoverEveryVisiblePairOnce) {
  for (const Case& c : cases()) {
    for (std::int64_t tile_m : tiles) {
      for (std::int64_t tile_n : tiles) {
        Visits visits(c);
        for (std::int64_t n = 0; n < ceil_div(c.sk, tile_n); ++n) {
          const Range keys = block_of(n, tile_n);
          const QueryBlocks b = query_blocks(c.mask, keys.begin, keys.end, c.sq, c.sk, tile_m);
          ASSERT_LE(0, b.m_begin) << c;
          ASSERT_LE(b.m_begin, b.m_full_begin) << c;
          ASSERT_LE(b.m_full_begin, b.m_full_end) << c;
          ASSERT_LE(b.m_full_end, b.m_end) << c;
          ASSERT_LE(b.m_end, ceil_div(c.sq, tile_m)) << c;
          for (std::int64_t m = b.m_begin; m < b.m_end; ++m) {
            const bool masked = m < b.m_full_begin || m >= b.m_full_end;
            visits.block(block_of(m, tile_m), keys, masked);
            ASSERT_TRUE(any_visible(c, block_of(m, tile_m), keys)) << c << " block " << m;
            ASSERT_EQ(masked, !all_visible(c, block_of(m, tile_m), keys)) << c << " block " << m;
          }
        }
        visits.expect_every_visible_pair_once();
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST(Schedule, ClippedKeysLeaveTheLastTileUnmasked) {
  // 10 keys in tiles of 4: the last tile reaches over the end.
  const QueryBlocks ragged = query_blocks({}, 8, 12, 6, 10, 4);
  EXPECT_EQ(ragged.m_full_begin, ragged.m_full_end);
  const QueryBlocks clipped = query_blocks({}, 8, 10, 6, 10, 4);
  EXPECT_EQ(clipped.m_full_begin, 0);
  EXPECT_EQ(clipped.m_full_end, 2);  // rows 4 and 5, and two that do not exist
}

TEST(Schedule, WithoutLeftLimitNoMaskedBlockComesFirst) {
  for (const Case& c : cases()) {
    if (c.mask.left >= 0 || c.mask.chunk > 0) continue;
    for (std::int64_t row = 0; row < c.sq; row += 3) {
      const KeyBlocks b = key_blocks(c.mask, row, row + 3, c.sq, c.sk, 4);
      EXPECT_EQ(b.n_begin, b.n_full_begin) << c;
      if (c.mask.right < 0) {
        EXPECT_EQ(b.n_full_end, c.sk / 4) << c;
      }
    }
  }
}

TEST(Schedule, NothingToVisit) {
  const Mask causal{-1, 0, 0};
  for (const KeyBlocks& b : {key_blocks(causal, 0, 4, 4, 0, 2),     // no keys
                             key_blocks(causal, 0, 4, 9, 5, 2),     // rows before the diagonal
                             key_blocks(causal, 4, 8, 4, 5, 2),     // rows beyond the sequence
                             key_blocks(causal, 0, 4, 0, 5, 2)}) {  // no rows
    EXPECT_EQ(b.n_begin, b.n_end);
    EXPECT_EQ(b.n_full_begin, b.n_full_end);
  }
  for (const QueryBlocks& b : {query_blocks(causal, 0, 4, 0, 5, 2),  // no rows
                               query_blocks(causal, 5, 9, 4, 5, 2),  // keys beyond the sequence
                               query_blocks({1, 0, 0}, 0, 2, 2, 9, 2)}) {  // keys before the window
    EXPECT_EQ(b.m_begin, b.m_end);
    EXPECT_EQ(b.m_full_begin, b.m_full_end);
  }
}

TEST(Schedule, SplitsPartitionTheBlocks) {
  for (std::int64_t begin : {0, 3}) {
    for (std::int64_t size = 0; size <= 20; ++size) {
      for (std::int64_t num_splits = 1; num_splits <= 25; ++num_splits) {
        std::int64_t next = begin;
        std::int64_t smallest = size;
        std::int64_t largest = 0;
        for (std::int64_t split = 0; split < num_splits; ++split) {
          const Range part = split_blocks({begin, begin + size}, split, num_splits);
          ASSERT_EQ(part.begin, next);
          ASSERT_LE(part.begin, part.end);
          next = part.end;
          smallest = part.size() < smallest ? part.size() : smallest;
          largest = part.size() > largest ? part.size() : largest;
        }
        ASSERT_EQ(next, begin + size);
        ASSERT_LE(largest - smallest, 1);
      }
    }
  }
}

TEST(Schedule, SplitsOfAnEmptyRangeAreEmpty) {
  for (std::int64_t split : {0, 1, 2}) EXPECT_TRUE(split_blocks({5, 2}, split, 3).empty());
}

TEST(Schedule, PackedRowsMapBackUniquely) {
  for (std::int64_t group : {1, 2, 3, 5, 8, 64}) {
    for (std::int64_t tile : {1, 4, 7, 64, 128}) {
      const std::int64_t positions = 9;
      const std::int64_t rows = positions * group;
      std::set<std::pair<std::int64_t, std::int64_t>> seen;
      for (std::int64_t first = 0; first < rows; first += tile) {
        const std::int64_t end = first + tile < rows ? first + tile : rows;
        const Range covered = packed_positions(first, end, group);
        EXPECT_EQ(covered.begin, unpack_row(first, group).position);
        EXPECT_EQ(covered.end, unpack_row(end - 1, group).position + 1);
        for (std::int64_t r = first; r < end; ++r) {
          const PackedRow row = unpack_row(r, group);
          EXPECT_LT(row.head_in_group, group);
          EXPECT_TRUE(seen.insert({row.position, row.head_in_group}).second);
        }
      }
      EXPECT_EQ(seen.size(), static_cast<std::size_t>(rows));
      EXPECT_EQ(seen.rbegin()->first, positions - 1);
    }
  }
}

TEST(Schedule, SizesBeyond32Bits) {
  const std::int64_t length = (std::int64_t{1} << 40) + 5;
  const KeyBlocks b = key_blocks({127, 0, 0}, length - 128, length, length, length, 128);
  EXPECT_EQ(b.n_end, ceil_div(length, 128));
  EXPECT_EQ(b.n_begin, (length - 128 - 127) / 128);
  const Range last = split_blocks({0, length}, 255, 256);
  EXPECT_EQ(last.end, length);
}

}  // namespace
}  // namespace sinkattn
