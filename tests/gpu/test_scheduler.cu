// SPDX-License-Identifier: Apache-2.0
// core/scheduler.cuh: every tile of every sequence is handed out exactly once, whatever the grid,
// in the order that the header promises, for dense and packed batches.
#include <algorithm>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "gpu_test.h"
#include "hopper/core/scheduler.cuh"

namespace sinkattn::hopper::testing {
namespace {

/// One warp per block walks over its tiles as the kernels do. Visit i of the whole grid is written
/// to visits[i]; with one block that is the order of the tiles.
__global__ void __launch_bounds__(32)
    walk_tiles(const TileOrder order, const SequenceSide side, int* count, TileIndex* visits) {
  __shared__ PackedCursor cursor;
  TileScheduler scheduler(order, side, &cursor);
  int number = static_cast<int>(blockIdx.x);
  TileIndex index{};
  while (scheduler.locate(number, &index)) {
    if (threadIdx.x == 0) visits[atomicAdd(count, 1)] = index;
    number = scheduler.next(number);
  }
}

using Key = std::tuple<int, int, int, int>;  // sequence, level, head, split

Key key_of(const TileIndex& tile) { return {tile.sequence, tile.level, tile.head, tile.split}; }

class Scheduler : public HopperTest {
 protected:
  /// `extents` are the rows of each sequence, the two further ones of a packed batch included.
  void check(TileOrder order, const SequenceSide& side, const std::vector<int>& extents) {
    std::vector<Key> expected;
    for (int b = 0; b < static_cast<int>(extents.size()); ++b) {
      const int levels = (extents[b] + order.tile_rows - 1) / order.tile_rows;
      for (int level = 0; level < levels; ++level) {
        for (int head = 0; head < order.heads; ++head) {
          for (int split = 0; split < order.splits; ++split) {
            expected.push_back({b, level, head, split});
          }
        }
      }
    }
    std::sort(expected.begin(), expected.end());
    for (const int grid : {1, 2, 7, 132}) {
      for (const bool counted : {false, true}) {
        DeviceArray<int> counter(1, 0), count(1, 0);
        DeviceArray<TileIndex> visits(expected.size() + 64);
        order.counter = counted ? counter.device() : nullptr;
        ASSERT_CUDA(launch(&walk_tiles, grid, 32, 0, order, side, count.device(), visits.device()));
        ASSERT_CUDA(count.download());
        ASSERT_EQ(count.host[0], static_cast<int>(expected.size())) << "grid " << grid;
        ASSERT_CUDA(visits.download());
        visits.host.resize(expected.size());
        if (grid == 1) check_order(order, visits.host);
        std::vector<Key> seen;
        for (const TileIndex& tile : visits.host) seen.push_back(key_of(tile));
        std::sort(seen.begin(), seen.end());
        ASSERT_EQ(seen, expected) << "grid " << grid << ", counted " << counted;
      }
    }
  }

  /// Sections one after the other; in each, levels never rise; heads of a group stay together.
  static void check_order(const TileOrder& order, const std::vector<TileIndex>& visits) {
    const int kv_heads = order.heads / order.group;
    int section = 0, level = 1 << 30;
    for (const TileIndex& tile : visits) {
      const int kv_head = tile.head / order.group;
      const int unit = order.packed ? kv_head : tile.sequence * kv_heads + kv_head;
      ASSERT_GE(order.section_of(unit), section);
      if (order.section_of(unit) > section) level = 1 << 30;
      section = order.section_of(unit);
      ASSERT_LE(tile.level, level);
      level = tile.level;
    }
    const int together = order.group * order.splits;
    for (std::size_t i = 0; i < visits.size(); ++i) {
      const TileIndex& first = visits[i / together * together];
      ASSERT_EQ(visits[i].sequence, first.sequence);
      ASSERT_EQ(visits[i].head / order.group, first.head / order.group);
    }
  }
};

TEST_F(Scheduler, DenseTilesOnceEach) {
  for (const int sections : {1, 2, 4, 6}) {
    for (const int splits : {1, 3}) {
      TileOrder order;
      order.tile_rows = 192;
      order.sequences = 3;
      order.heads = 8;
      order.group = 4;
      order.splits = splits;
      order.levels = 4;
      order.units = 6;
      order.sections = sections;
      ASSERT_NO_FATAL_FAILURE(check(order, SequenceSide{}, std::vector<int>(3, 600)));
    }
  }
}

/// Batches with sequences of no tokens, one, around a tile, and more than 32 or 64 of them; rows
/// before the first offset and after the last.
TEST_F(Scheduler, PackedTilesOnceEach) {
  Integers integers(9);
  std::vector<std::vector<int>> batches{{1}, {0}, {191, 192, 193}, {0, 0, 1000, 0}};
  for (const int size : {32, 33, 62, 63, 64, 100}) {
    std::vector<int> batch;
    for (int i = 0; i < size; ++i) batch.push_back(std::max(0, 300 + integers.next(500)));
    batches.push_back(batch);
  }
  for (const std::vector<int>& lengths : batches) {
    for (const int before : {0, 5}) {
      for (const int after : {0, 400}) {
        std::vector<std::int32_t> offsets{before};
        for (const int length : lengths) offsets.push_back(offsets.back() + length);
        const DeviceArray<std::int32_t> device_offsets(offsets);
        SequenceSide side;
        side.cu_seqlens = device_offsets.device();
        side.capacity = offsets.back() + after;
        TileOrder order;
        order.tile_rows = 192;
        order.sequences = static_cast<int>(lengths.size());
        order.heads = 6;
        order.group = 2;
        order.units = 3;
        order.sections = 2;
        order.packed = true;
        std::vector<int> extents = lengths;
        extents.push_back(after);   // rows after the last sequence
        extents.push_back(before);  // and before the first
        ASSERT_NO_FATAL_FAILURE(check(order, side, extents)) << lengths.size() << " sequences";
      }
    }
  }
}

}  // namespace
}  // namespace sinkattn::hopper::testing
