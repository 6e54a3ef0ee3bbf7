// SPDX-License-Identifier: Apache-2.0
// The general forward kernel, its loads from a paged cache. A key block is put together from boxes
// of at most a page, one per lane of the loading warp.
//
// Page ids are untrusted: they are clamped to the pages that exist, and only entries of keys that
// some row of the tile sees are read. Boxes without such a key are not loaded; what their rows of
// the stage hold makes scores that the mask removes. Weights of these keys are 0, but 0 times the
// NaN that a page may hold beyond the sequence, or left of a window, is NaN. So the producer clears
// the rows of V that nobody sees, before it hands on the stage.
#pragma once

#include "common/sequence.h"
#include "hopper/kernels/forward_producer.cuh"
#include "hopper/kernels/forward_smem.cuh"
#include "hopper/ptx/mbarrier.cuh"
#include "hopper/ptx/sync.cuh"
#include "hopper/ptx/tma.cuh"

namespace sinkattn::hopper {

/// What one lane loads of a key block: rows from `row` on of one page. page < 0: nothing.
struct PageBox {
  int page, row;
  int boxes;  ///< of all lanes
};

template <class C>
__device__ inline PageBox find_box(const ForwardArguments& a, const TileInfo& tile, int block) {
  const int offset = static_cast<int>(threadIdx.x % 32) * a.page_box_rows;
  const int token = block * C::tile_n + offset;
  const bool used = offset < C::tile_n && token < tile.visible_end &&
                    token + a.page_box_rows > tile.visible_begin;
  PageBox box{-1, 0, __popc(__ballot_sync(0xffffffffu, used))};
  if (used) {
    const int page_size = static_cast<int>(a.keys.page_size);
    const int entry = token / page_size;
    box.row = token - entry * page_size;
    box.page =
        clamp<int>(__ldg(a.keys.page_table + tile.key_batch * a.keys.page_table_stride + entry), 0,
                   static_cast<int>(a.keys.num_pages) - 1);
  }
  return box;
}

/// Loads the first `slabs` slabs of the boxes of all lanes; announces the bytes to `barrier`. Bytes
/// may come before they are announced: the phase cannot end before the arrival that does so.
template <class T>
__device__ inline void load_boxes(const ForwardArguments& a, const PageBox& box, int kv_head,
                                  const unsigned char* destination, const CUtensorMap* map,
                                  std::uint64_t* barrier, int slabs) {
  const int lane = threadIdx.x % 32;
  const int box_bytes = a.page_box_rows * slab_row_bytes;
  if (lane == 0) ptx::mbarrier_arrive_expect_tx(barrier, box.boxes * box_bytes * slabs);
  if (box.page >= 0) {
#pragma unroll
    for (int slab = 0; slab < T::slabs; ++slab) {
      if (slab >= slabs) break;
      ptx::tma_load(ptx::shared_address(destination) + slab * T::slab_bytes + lane * box_bytes, map,
                    barrier, {slab * slab_columns, box.row, 0, kv_head, box.page});
    }
  }
  __syncwarp();
}

/// Zeroes the rows of a value stage that no row of the tile sees, for the products to read.
template <class C>
__device__ inline void clear_unseen_rows(const TileInfo& tile, int block, unsigned char* stage,
                                         int slabs) {
  using Value = typename ForwardSmem<C>::Value;
  const int begin = tile.visible_begin - block * C::tile_n;
  const int end = tile.visible_end - block * C::tile_n;
  constexpr int chunks = slab_row_bytes / 16;
#pragma unroll 1
  for (int slab = 0; slab < slabs; ++slab) {
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < C::tile_n * chunks; i += 32) {
      const int row = i / chunks;
      if (row >= begin && row < end) continue;
      reinterpret_cast<uint4*>(stage + slab * Value::slab_bytes)[i] = make_uint4(0, 0, 0, 0);
    }
  }
  ptx::fence_proxy_async_shared();
  __syncwarp();
}

/// The keys of a tile, by one warp, with its queries in front. Pages are looked up a block ahead,
/// so that no copy waits for the table.
template <class C>
__device__ inline void load_paged_keys(const ForwardArguments& a, ForwardSmem<C>& smem) {
  using Smem = ForwardSmem<C>;
  const int lane = threadIdx.x % 32;
  RingPosition<C::query_stages> q;
  RingPosition<C::stages> k;
  for (;; q.advance()) {
    ptx::mbarrier_wait(&smem.tile_full[q.stage], q.parity);  // arrive: schedule_tiles
    const TileInfo& tile = smem.tile[q.stage];
    const bool valid = tile.valid;
    const int begin = tile.block_begin;
    int block = tile.block_end - 1;
    __syncwarp();  // everyone has read: without key blocks the tile's description may go
    if (!valid || block < begin) {
      if (lane == 0) ptx::mbarrier_arrive(&smem.query_full[q.stage]);
      if (!valid) return;
      continue;
    }
    PageBox box = find_box<C>(a, tile, block);
    if (lane == 0) {
      load_tile<typename Smem::Query>(smem.query[q.stage], &a.query, &smem.query_full[q.stage],
                                      {0, a.map_rows_q - tile.length + tile.first_position,
                                       tile.first_row + tile.length, tile.head, tile.batch},
                                      a.query_slabs);
    }
    __syncwarp();
    for (; block >= begin; --block) {
      ptx::mbarrier_wait(&smem.key_empty[k.stage], k.parity ^ 1);  // arrive: release_key
      load_boxes<typename Smem::Key>(a, box, tile.kv_head, smem.key[k.stage], &a.key,
                                     &smem.key_full[k.stage], a.query_slabs);
      if (block > begin) box = find_box<C>(a, tile, block - 1);
      k.advance();
    }
  }
}

/// The values of a tile, by another warp. It takes part in releasing the tile's description, which
/// the consumers of a tile without key blocks give back at once.
template <class C>
__device__ inline void load_paged_values(const ForwardArguments& a, ForwardSmem<C>& smem) {
  using Smem = ForwardSmem<C>;
  const int lane = threadIdx.x % 32;
  RingPosition<C::query_stages> q;
  RingPosition<C::stages> v;
  std::uint32_t page_parity = 0;
  for (;; q.advance()) {
    ptx::mbarrier_wait(&smem.tile_full[q.stage], q.parity);  // arrive: schedule_tiles
    const TileInfo& tile = smem.tile[q.stage];
    if (!tile.valid) return;
    const int begin = tile.block_begin;
    int block = tile.block_end - 1;
    PageBox box = find_box<C>(a, tile, block);
    for (; block >= begin; --block) {
      const bool cut =
          block * C::tile_n < tile.visible_begin || (block + 1) * C::tile_n > tile.visible_end;
      ptx::mbarrier_wait(&smem.value_empty[v.stage], v.parity ^ 1);  // arrive: release_value
      load_boxes<typename Smem::Value>(a, box, tile.kv_head, smem.value[v.stage], &a.value,
                                       cut ? &smem.page_full : &smem.value_full[v.stage],
                                       a.value_slabs);
      if (cut) {
        ptx::mbarrier_wait(&smem.page_full, page_parity);  // arrive: the load just made
        page_parity ^= 1;
        clear_unseen_rows<C>(tile, block, smem.value[v.stage], a.value_slabs);
        if (lane == 0) ptx::mbarrier_arrive(&smem.value_full[v.stage]);
      }
      if (block > begin) box = find_box<C>(a, tile, block - 1);
      v.advance();
    }
    __syncwarp();  // everyone has read the description
    if (lane == 0) ptx::mbarrier_arrive(&smem.query_empty[q.stage]);
  }
}

}  // namespace sinkattn::hopper
