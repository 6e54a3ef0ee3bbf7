// SPDX-License-Identifier: Apache-2.0
// The ring through which one warp streams its keys and values. Warps of a block take turns over the
// keys of a piece (warp w: steps w, w + 4, ..), each with a ring, copies and waits of its own: no
// barrier of the block is in the loop, and a slow warp holds nobody up.
//
// One slot holds `Keys` rows of K and of V as slabs with the 128-byte swizzle (core/tile.cuh). Rows
// past the end, and columns past the head dim, are zeros: memory outside the sequence is never read,
// so whatever it holds cannot matter.
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

  /// Tokens first, first + Stride, .. (Keys each) below `end`, of sequence b and one KV head.
  __device__ KeyStream(const DecodeParams& p, std::uint32_t ring, int b, int kv_head,
                       int first_slot, int first, int end)
      : p_(p), ring_(ring), key_(first), end_(end), first_slot_(first_slot) {
    static_assert(Keys <= 32, "a lane looks up the page of one key");
    const std::int64_t row = p.packed_k ? 0 : p.keys.cache_row(b);
    const bool paged = p.keys.page_table != nullptr;
    const std::int64_t batch = paged ? 0 : row;
    table_ = paged ? p.keys.page_table + row * p.keys.page_table_stride : nullptr;
    key_base_ = static_cast<const char*>(p.keys.key.data) + 2 * p.keys.key.offset(batch, 0, kv_head);
    value_base_ =
        static_cast<const char*>(p.keys.value.data) + 2 * p.keys.value.offset(batch, 0, kv_head);
    look_up();
  }

  /// Fills the whole ring. One commit per slot, whether or not there is anything to copy, so that
  /// counting groups is counting slots.
  __device__ void fill() {
#pragma unroll
    for (int slot = 0; slot < Slots; ++slot) refill(slot);
  }

  /// Copies the next step into `slot`, whose last reader has passed a __syncwarp.
  __device__ void refill(int slot) {
    if (key_ < end_) {
      copy_tile<KeyTile, Columns>(slot_address(slot), key_base_, p_.keys.key, p_.head_dim);
      copy_tile<ValueTile, ColumnsV>(slot_address(slot) + KeyTile::bytes, value_base_,
                                     p_.keys.value, p_.head_dim_v);
      key_ += Stride;
      look_up();
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
  __device__ void look_up() {
    if (table_ == nullptr || key_ >= end_) return;
    const int slot = first_slot_ + min(key_ + lane() % Keys, end_ - 1);
    const int entry = p_.page_size.divide(slot);
    row_ = slot - entry * static_cast<int>(p_.page_size.divisor);
    page_ = __ldg(table_ + entry);
  }

  template <class TileOf, int TileColumns>
  __device__ void copy_tile(std::uint32_t to, const char* base, const HeadsTensor& tensor,
                            int head_dim) const {
    constexpr int chunks = TileColumns / 8;
    static_assert(Keys * chunks % 32 == 0);
    const int page = static_cast<int>(clamp_index(page_, 0, p_.keys.num_pages - 1));
#pragma unroll
    for (int i = 0; i < Keys * chunks / 32; ++i) {
      const int item = 32 * i + lane();
      const int r = item / chunks;
      const int chunk = item % chunks;
      std::int64_t offset;
      if (table_ != nullptr) {
        offset = __shfl_sync(0xffffffffu, page, r) * tensor.stride_batch +
                 __shfl_sync(0xffffffffu, row_, r) * tensor.stride_row;
      } else {
        offset = static_cast<std::int64_t>(first_slot_ + key_ + r) * tensor.stride_row;
      }
      const bool valid = key_ + r < end_ && 8 * chunk < head_dim;
      ptx::copy_async_16(to + chunk / 8 * TileOf::slab_bytes + swizzled_offset(r, chunk % 8),
                         valid ? base + 2 * offset + 16 * chunk : base, valid);
    }
  }

  __device__ static int lane() { return static_cast<int>(threadIdx.x % 32); }

  const DecodeParams& p_;
  const std::int32_t* table_;
  const char* key_base_;
  const char* value_base_;
  std::uint32_t ring_;
  int key_, end_, first_slot_;
  int page_ = 0, row_ = 0;
};

}  // namespace sinkattn::hopper
