// SPDX-License-Identifier: Apache-2.0
// Visibility and sequences: the intervals against the definition, exhaustively for small sizes.
#include <gtest/gtest.h>

#include <climits>
#include <vector>

#include "common/mask.h"
#include "common/sequence.h"

namespace sinkattn {
namespace {

std::vector<Mask> masks() {
  std::vector<Mask> all;
  for (std::int64_t left : {-1, 0, 1, 3, 100}) {
    for (std::int64_t right : {-1, 0, 2, 100}) {
      for (std::int64_t chunk : {0, 1, 3, 7, 100}) all.push_back({left, right, chunk});
    }
  }
  return all;
}

TEST(Visibility, IntervalsAgreeWithTheDefinition) {
  for (const Mask& mask : masks()) {
    for (std::int64_t sq = 0; sq <= 9; ++sq) {
      for (std::int64_t sk = 0; sk <= 9; ++sk) {
        for (std::int64_t i = 0; i < sq; ++i) {
          const Range keys = visible_keys(mask, i, sq, sk);
          for (std::int64_t j = 0; j < sk; ++j) {
            const bool visible = keep(mask, i, j, sq, sk);
            EXPECT_EQ(visible, j >= keys.begin && j < keys.end);
            const Range rows = visible_queries(mask, j, sq, sk);
            EXPECT_EQ(visible, i >= rows.begin && i < rows.end);
          }
        }
      }
    }
  }
}

TEST(Visibility, EndsNeverDecreaseWithTheRow) {
  for (const Mask& mask : masks()) {
    for (std::int64_t sq : {1, 5, 12}) {
      for (std::int64_t sk : {0, 1, 7, 20}) {
        for (std::int64_t i = 1; i < sq; ++i) {
          const Range above = visible_keys(mask, i - 1, sq, sk);
          const Range row = visible_keys(mask, i, sq, sk);
          EXPECT_LE(above.begin, row.begin);
          EXPECT_LE(above.end, row.end);
        }
      }
    }
  }
}

TEST(Visibility, HugeWindowsAreUnlimited) {
  MaskParams params;
  params.window_left = params.window_right = params.attention_chunk = INT64_MAX;
  const Mask mask = make_mask(params);
  EXPECT_EQ(mask.left, -1);
  EXPECT_EQ(mask.right, -1);
  const Range keys = visible_keys(mask, 3, 5, 4);
  EXPECT_EQ(keys.begin, 0);
  EXPECT_EQ(keys.end, 4);
}

TEST(Visibility, CausalForcesTheRightSide) {
  MaskParams params;
  params.causal = true;
  params.window_right = 5;
  EXPECT_EQ(make_mask(params).right, 0);
}

TEST(Sequence, IndexValuesAreClamped) {
  const std::int32_t wild[] = {INT_MIN, -1, 0, 3, INT_MAX, 5, INT_MAX};
  for (int b = 0; b + 1 < 7; ++b) {
    for (std::int32_t used : {INT_MIN, 0, 4, INT_MAX}) {
      const std::vector<std::int32_t> seqused(7, used);
      const SequenceInfo info = resolve_sequence({wild, seqused.data(), seqused.data(), 10, 8}, b);
      EXPECT_GE(info.first_row, 0);
      EXPECT_GE(info.length, 0);
      EXPECT_LE(info.first_row + info.length, 10);
      EXPECT_LE(info.length, 8);
    }
  }
}

TEST(Sequence, LeftPaddingShortensTheFront) {
  const std::int32_t used[] = {7};
  const std::int32_t pad[] = {3};
  const SequenceInfo info = resolve_sequence({nullptr, used, pad, 10, -1}, 0);
  EXPECT_EQ(info.first_row, 3);
  EXPECT_EQ(info.length, 4);
  EXPECT_EQ(info.extent, 10);
}

}  // namespace
}  // namespace sinkattn
