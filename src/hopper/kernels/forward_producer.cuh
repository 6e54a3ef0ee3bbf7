// SPDX-License-Identifier: Apache-2.0
// The general forward kernel, its producers: a warp that schedules tiles and a thread that loads
// them. They run one tile ahead of the consumers.
#pragma once

#include "common/schedule.h"
#include "hopper/kernels/forward_smem.cuh"
#include "hopper/ptx/mbarrier.cuh"
#include "hopper/ptx/tma.cuh"

namespace sinkattn::hopper {

/// Entry of the key tensors that sequence b reads.
__device__ inline int key_batch(const ForwardArguments& a, int b) {
  if (a.keys.cache_batch_idx == nullptr) return b;
  return clamp<int>(a.keys.cache_batch_idx[b], 0, static_cast<int>(a.keys.cache_rows) - 1);
}

/// Resolves tile `index`: sequence, visible key blocks, the share of its split.
template <class C>
__device__ inline void describe_tile(const ForwardArguments& a, const TileIndex& index,
                                     TileInfo& tile) {
  const bool pseudo = a.order.packed && index.sequence >= a.order.sequences;
  const BasicSequenceInfo<int> queries =
      a.order.packed ? packed_sequence(a.side_q, index.sequence, a.order.sequences)
                     : resolve_sequence<int>(a.side_q, index.sequence);
  BasicSequenceInfo<int> keys;
  if (!pseudo) keys = resolve_sequence<int>(a.side_k, index.sequence);
  tile.head = index.head;
  tile.first_position = index.level * C::tile_m;
  tile.split = index.split;
  tile.batch = a.order.packed ? 0 : index.sequence;
  tile.first_row = queries.first_row;
  tile.length = queries.length;
  tile.extent = queries.extent;
  tile.keys = keys.length;
  tile.key_end = keys.first_row + keys.length;
  tile.key_batch = pseudo || a.keys_packed ? 0 : key_batch(a, index.sequence);
  tile.kv_head = index.head / a.order.group;
  const BasicKeyBlocks<int> blocks =
      key_blocks(a.mask, tile.first_position, tile.first_position + C::tile_m, queries.length,
                 keys.length, C::tile_n);
  const BasicRange<int> mine =
      split_blocks(BasicRange<int>{blocks.n_begin, blocks.n_end}, index.split, a.order.splits);
  tile.block_begin = mine.begin;
  tile.block_end = mine.end;
  if constexpr (C::paged) {
    const int last = min(tile.first_position + C::tile_m, tile.length) - 1;
    tile.visible_begin = visible_keys(a.mask, tile.first_position, tile.length, tile.keys).begin;
    tile.visible_end = visible_keys(a.mask, last, tile.length, tile.keys).end;
  }
}

/// The scheduling warp: one tile ahead of the loads, it announces every tile in shared memory.
template <class C>
__device__ inline void schedule_tiles(const ForwardArguments& a, ForwardSmem<C>& smem) {
  TileScheduler scheduler(a.order, a.side_q, &smem.cursor);
  RingPosition<C::query_stages> q;
  int number = blockIdx.x;
  bool valid = true;
  while (valid) {
    TileIndex index{};
    valid = scheduler.locate(number, &index);
    if (valid) number = scheduler.next(number);
    ptx::mbarrier_wait(&smem.query_empty[q.stage], q.parity ^ 1);  // arrive: release_query
    if (threadIdx.x % 32 == 0) {
      TileInfo& tile = smem.tile[q.stage];
      tile.valid = valid;
      if (valid) describe_tile<C>(a, index, tile);
      ptx::mbarrier_arrive(&smem.tile_full[q.stage]);
    }
    __syncwarp();
    q.advance();
  }
}

/// Loads the first `used` slabs of a tile, boxes of 64 columns, and announces them to `barrier`.
/// Slabs wholly beyond the tensor's columns are never asked for: for such a box the copy engine
/// touches the base address of its map, which need not be mapped (core/tensor_map.h). They hold the
/// zeros of clear_unused_slabs().
template <class T>
__device__ inline void load_tile(const unsigned char* destination, const CUtensorMap* map,
                                 std::uint64_t* barrier, ptx::BoxCoordinates at, int used) {
  ptx::mbarrier_arrive_expect_tx(barrier, used * T::slab_bytes);
#pragma unroll
  for (int slab = 0; slab < T::slabs; ++slab) {
    if (slab >= used) break;
    ptx::tma_load(ptx::shared_address(destination) + slab * T::slab_bytes, map, barrier, at);
    at.c0 += slab_columns;
  }
}

/// The loading thread: queries of every tile, then its K and V blocks from the last to the first,
/// K one block ahead of V.
template <class C>
__device__ inline void load_tiles(const ForwardArguments& a, ForwardSmem<C>& smem) {
  using Smem = ForwardSmem<C>;
  RingPosition<C::query_stages> q;
  RingPosition<C::stages> k, v;
  for (;; q.advance()) {
    ptx::mbarrier_wait(&smem.tile_full[q.stage], q.parity);  // arrive: schedule_tiles
    const TileInfo& tile = smem.tile[q.stage];
    const bool valid = tile.valid;
    if (!valid || tile.block_begin >= tile.block_end) {
      ptx::mbarrier_arrive(&smem.query_full[q.stage]);
      if (!valid) return;
      continue;
    }
    load_tile<typename Smem::Query>(smem.query[q.stage], &a.query, &smem.query_full[q.stage],
                                    {0, a.map_rows_q - tile.length + tile.first_position,
                                     tile.first_row + tile.length, tile.head, tile.batch},
                                    a.query_slabs);
    ptx::BoxCoordinates at{0, 0, tile.key_end, tile.kv_head, tile.key_batch};
    const int row_of_key_0 = a.map_rows_k - tile.keys;
    const int begin = tile.block_begin;
    for (int block = tile.block_end; block >= begin; --block) {
      if (block > begin) {
        ptx::mbarrier_wait(&smem.key_empty[k.stage], k.parity ^ 1);  // arrive: release_key
        at.c1 = row_of_key_0 + (block - 1) * C::tile_n;
        load_tile<typename Smem::Key>(smem.key[k.stage], &a.key, &smem.key_full[k.stage], at,
                                      a.query_slabs);
        k.advance();
      }
      if (block < tile.block_end) {
        ptx::mbarrier_wait(&smem.value_empty[v.stage], v.parity ^ 1);  // arrive: release_value
        at.c1 = row_of_key_0 + block * C::tile_n;
        load_tile<typename Smem::Value>(smem.value[v.stage], &a.value, &smem.value_full[v.stage],
                                        at, a.value_slabs);
        v.advance();
      }
    }
  }
}

}  // namespace sinkattn::hopper
