// SPDX-License-Identifier: Apache-2.0
// What the main warpgroups of the key pass have in common: where their 64 keys lie, the statistics
// of the queries, the mask, and dS on its way to shared memory.
#pragma once

#include "hopper/kernels/backward_keys.cuh"
#include "hopper/kernels/backward_keys_store.cuh"

namespace sinkattn::hopper {

/// A main warpgroup: 64 keys. `StatisticsWindow`: see ColumnStatistics.
template <class C, int StatisticsWindow>
struct MainWarpgroup {
  using T = typename C::T;
  using Smem = KeyPassSmem<C>;
  static constexpr int query_blocks = C::queries / 16;  ///< k16 steps of dV and dK
  static constexpr int score_registers = C::queries / 2;
  using Scores = float[score_registers];
  using Packed = std::uint32_t[query_blocks][4];  ///< P or dS of a tile

  const BackwardArguments& p;
  const KeyPassBarriers<C>& barriers;
  char* smem;
  int group;
  // Kept in registers: reading the thread index again in every tile is slow.
  std::uint32_t statistics;  ///< address of LSE2 of stage 0, moved to this thread's first column
  std::uint32_t score;       ///< address of slot 0 of dS where this thread stores

  __device__ __forceinline__ MainWarpgroup(const BackwardArguments& p_,
                                           const KeyPassBarriers<C>& barriers_, char* smem_)
      : p(p_), barriers(barriers_), smem(smem_) {
    group = static_cast<int>(threadIdx.x) / 128 - C::first_main_group;
    const int lane = threadIdx.x % 32;
    statistics = opaque(ptx::shared_address(smem + Smem::lse2) + 8 * (lane % 4));
    score = opaque(ptx::shared_address(smem + Smem::score + group * C::ScoreTile::slab_bytes) +
                   swizzled_offset(lane % 8 + lane / 16 * 8, 2 * warp() + lane / 8 % 2));
  }

  __device__ __forceinline__ static int warp() { return threadIdx.x % 128 / 32; }

  __device__ __forceinline__ const BlockFacts& facts() const {
    return *reinterpret_cast<const BlockFacts*>(smem + Smem::facts);
  }

  using Statistics = ColumnStatistics<C::queries / 8, StatisticsWindow>;

  __device__ __forceinline__ Statistics lse2(int stage) const {
    return Statistics(statistics + stage * C::queries * 4);
  }

  __device__ __forceinline__ Statistics softmax_d(int stage) const {
    return Statistics(statistics + (Smem::softmax_d - Smem::lse2) + stage * C::queries * 4);
  }

  /// Which registers of a tile's P and dS belong to queries that see their key.
  __device__ __forceinline__ std::uint32_t visible_queries(int tile) const {
    const auto* all = reinterpret_cast<const VisibleInterval*>(smem + Smem::intervals);
    return visible_registers<score_registers>(
        all + C::group_key(group) + warp() * 16 + threadIdx.x % 32 / 4, tile * C::queries,
        threadIdx.x % 4);
  }

  /// dS^T of this warpgroup into its slab of a dS tile, as [query][key]. The slot must be free.
  __device__ __forceinline__ void store_score_gradients(const Packed& ds, int slot) const {
    const std::uint32_t address = score + slot * C::ScoreTile::bytes;
#pragma unroll
    for (int k = 0; k < query_blocks; ++k) {
      ptx::store_matrix_x4_transposed(address + k * 16 * slab_row_bytes, ds[k][0], ds[k][1],
                                      ds[k][2], ds[k][3]);
    }
  }

  /// Hands the stored dS over to whoever forms dQ.
  __device__ __forceinline__ void publish_score_gradients(int slot) const {
    ptx::fence_proxy_async_shared();
    __syncwarp();
    if (ptx::elect_one()) ptx::mbarrier_arrive(barriers.score_full + slot);
  }

  __device__ __forceinline__ void release(int stage) const {
    __syncwarp();
    if (ptx::elect_one())
      ptx::mbarrier_arrive(barriers.stage_empty + stage);  // -> wait in load_tile
  }
};

}  // namespace sinkattn::hopper
