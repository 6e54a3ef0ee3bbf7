// SPDX-License-Identifier: Apache-2.0
// The ring through which one warp streams its keys and values. Warps of a block take turns over the
// keys of a piece (warp w: steps w, w + 4, ..), each with a ring, copies and waits of its own: no
// barrier of the block is in the loop, and a slow warp holds nobody up.
//
// One slot holds `Keys` rows of K and of V as slabs with the 128-byte swizzle (core/tile.cuh). Rows
// past the end, and columns past the head dim, are zeros: memory outside the sequence is never
// read, so whatever it holds cannot matter.
#pragma once

#include <cstdint>

#include "hopper/core/tile.cuh"
#include "hopper/kernels/decode.h"
#include "hopper/ptx/copy_async.cuh"

namespace sinkattn::hopper {

template <int Keys, int Slots, int Columns, int ColumnsV, int Stride>
class KeyStream {
 public:
  using KeyTile = Tile<Keys, Columns>;
  using ValueTile = Tile<Keys, ColumnsV>;
  static constexpr int slot_bytes = KeyTile::bytes + ValueTile::bytes;
  static constexpr int ring_bytes = Slots * slot_bytes;

  static_assert(Keys % 8 == 0 && Keys <= 32, "a lane looks up the page of one key");

  /// Tokens first, first + Stride, .. (Keys each) below `end`, of sequence b and one KV head; fills
  /// the whole ring. One commit per slot, whether or not there is anything to copy, so that
  /// counting groups is counting slots.
  __device__ void start(const DecodeParams& p, std::uint32_t ring, int b, int kv_head,
                        int first_slot, int first, int end) {
    ring_ = ring;
    key_ = first;
    end_ = end;
    first_slot_ = first_slot;
    const std::int64_t row = p.packed_k ? 0 : p.keys.cache_row(b);
    const bool paged = p.keys.page_table != nullptr;
    const std::int64_t batch = paged ? 0 : row;
    table_ = paged ? p.keys.page_table + row * p.keys.page_table_stride : nullptr;
    const int chunk = 16 * (lane() % 8);
    key_base_ = static_cast<const char*>(p.keys.key.data) +
                2 * p.keys.key.offset(batch, 0, kv_head) + chunk;
    value_base_ = static_cast<const char*>(p.keys.value.data) +
                  2 * p.keys.value.offset(batch, 0, kv_head) + chunk;
    look_up(p);
#pragma unroll 1  // its code is in front of the first byte that arrives: keep it short
    for (int slot = 0; slot < Slots; ++slot) refill(p, slot);
  }

  /// Copies the next step into `slot`, whose last reader has passed a __syncwarp.
  __device__ void refill(const DecodeParams& p, int slot) {
    if (key_ < end_) {
      if (table_ == nullptr) {
        copy_dense<KeyTile>(slot_address(slot), key_base_, p.keys.key, p.head_dim);
        copy_dense<ValueTile>(slot_address(slot) + KeyTile::bytes, value_base_, p.keys.value,
                              p.head_dim_v);
      } else {
        const std::int64_t page = clamp_index(page_, 0, p.keys.num_pages - 1);
        copy_pages<KeyTile>(slot_address(slot), key_base_, p.keys.key, page, p.head_dim);
        copy_pages<ValueTile>(slot_address(slot) + KeyTile::bytes, value_base_, p.keys.value, page,
                              p.head_dim_v);
      }
      key_ += Stride;
      look_up(p);
    }
    ptx::copy_async_commit();
  }

  /// Waits for the oldest slot: its copies are the only group older than the Slots - 1 newest.
  __device__ void wait() const {
    ptx::copy_async_wait<Slots - 1>();
    __syncwarp();
  }

  __device__ std::uint32_t slot_address(int slot) const { return ring_ + slot * slot_bytes; }

 private:
  /// Page and row in the page of this lane's key of the next step; read one step ahead of its use.
  __device__ void look_up(const DecodeParams& p) {
    if (table_ == nullptr || key_ >= end_) return;
    const int slot = first_slot_ + min(key_ + lane() % Keys, end_ - 1);
    const int entry = p.page_size.divide(slot);
    row_ = slot - entry * static_cast<int>(p.page_size.divisor);
    page_ = __ldg(table_ + entry);
  }

  // A copy instruction of the warp covers 4 rows x 128 bytes; this lane's row is 4 i + lane / 8.
  static constexpr int row_groups = Keys / 4;

  template <class TileOf>
  __device__ void copy_dense(std::uint32_t to, const char* base, const HeadsTensor& tensor,
                             int head_dim) const {
    const std::int64_t stride = 2 * tensor.stride_row;
    const char* row = base + (first_slot_ + key_ + lane() / 8) * stride;
#pragma unroll
    for (int i = 0; i < row_groups; ++i) {
      copy_row<TileOf>(to, i, row, head_dim);
      row += 4 * stride;
    }
  }

  /// Each lane has looked up one key; the lane that copies a row gets its offset by a shuffle.
  template <class TileOf>
  __device__ void copy_pages(std::uint32_t to, const char* base, const HeadsTensor& tensor,
                             std::int64_t page, int head_dim) const {
    const std::int64_t offset = 2 * (page * tensor.stride_batch + row_ * tensor.stride_row);
#pragma unroll
    for (int i = 0; i < row_groups; ++i) {
      copy_row<TileOf>(to, i, base + __shfl_sync(0xffffffffu, offset, 4 * i + lane() / 8),
                       head_dim);
    }
  }

  /// Row 4 i + lane / 8, one 16-byte chunk per slab.
  template <class TileOf>
  __device__ void copy_row(std::uint32_t to, int i, const char* row, int head_dim) const {
    const int r = 4 * i + lane() / 8;
    const int column = 8 * (lane() % 8);
    to += swizzled_offset(r, lane() % 8);
#pragma unroll
    for (int slab = 0; slab < TileOf::slabs; ++slab) {
      // Of a slab that is only partly used, the rest is never read.
      if (slab_columns * slab + column >= TileOf::columns) continue;
      const bool valid = key_ + r < end_ && slab_columns * slab + column < head_dim;
      ptx::copy_async_16_once(to + slab * TileOf::slab_bytes, row + slab * slab_row_bytes, valid,
                              policy_);
    }
  }

  __device__ static int lane() { return static_cast<int>(threadIdx.x % 32); }

  const std::int32_t* table_;
  const char* key_base_;
  const char* value_base_;
  std::uint64_t policy_ = ptx::evict_first_policy();
  std::uint32_t ring_;
  int key_, end_, first_slot_;
  int page_ = 0, row_ = 0;
};

}  // namespace sinkattn::hopper
