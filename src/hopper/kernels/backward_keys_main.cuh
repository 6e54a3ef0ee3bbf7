// SPDX-License-Identifier: Apache-2.0
// The main warpgroups of the key pass: 64 keys each, from scores to dS, dV and dK.
#pragma once

#include "hopper/kernels/backward_keys.cuh"
#include "hopper/kernels/backward_keys_store.cuh"

namespace sinkattn::hopper {

/// One main warpgroup: 64 keys.
template <class C>
struct KeyPassMain {
  using T = typename C::T;
  using Smem = KeyPassSmem<C>;
  using Tuning = typename C::Tuning;
  static constexpr int query_blocks = C::queries / 16;  ///< k16 steps of dV and dK
  static constexpr int score_registers = C::queries / 2;

  const BackwardArguments& p;
  const KeyPassBarriers<C>& barriers;
  char* smem;
  int group;
  // Kept in registers: reading the thread index again in every tile is slow.
  std::uint32_t statistics;  ///< address of LSE2 of stage 0, moved to this thread's first column
  std::uint32_t score;       ///< address of slot 0 of dS where this thread stores

  __device__ __forceinline__ KeyPassMain(const BackwardArguments& p_,
                                         const KeyPassBarriers<C>& barriers_, char* smem_)
      : p(p_), barriers(barriers_), smem(smem_) {
    group = static_cast<int>(threadIdx.x) / 128 - C::first_main_group;
    const int lane = threadIdx.x % 32;
    statistics = opaque(ptx::shared_address(smem + Smem::lse2) + 8 * (lane % 4));
    score = opaque(ptx::shared_address(smem + Smem::score + group * C::ScoreTile::slab_bytes) +
                   swizzled_offset(lane % 8 + lane / 16 * 8, 2 * warp() + lane / 8 % 2));
  }

  __device__ __forceinline__ static int warp() { return threadIdx.x % 128 / 32; }

  /// (64 keys) x (64 queries) of A B^T: S^T from K and Q, dP^T from V and dO.
  template <class KeyTile, class QueryTile>
  __device__ __forceinline__ void multiply_keys(float (&x)[score_registers], int a_offset,
                                                int b_offset) const {
    const std::uint64_t a = descriptor::k_major(ptx::shared_address(smem + a_offset) +
                                                group * C::warpgroup_keys * slab_row_bytes);
    const std::uint64_t b = descriptor::k_major(ptx::shared_address(smem + b_offset));
#pragma unroll
    for (int k = 0; k < KeyTile::columns / 16; ++k) {
      ptx::wgmma_ss<T, C::queries>(x, a + descriptor::k_step<KeyTile::slab_bytes>(k),
                                   b + descriptor::k_step<QueryTile::slab_bytes>(k), k != 0);
    }
  }

  __device__ __forceinline__ void multiply_scores(float (&s)[score_registers], int stage) const {
    multiply_keys<typename C::KeyTile, typename C::QueryTile>(
        s, Smem::key, Smem::query + stage * C::QueryTile::bytes);
  }

  __device__ __forceinline__ void multiply_dout(float (&dp)[score_registers], int stage) const {
    multiply_keys<typename C::ValueTile, typename C::DoutTile>(
        dp, Smem::value, Smem::dout + stage * C::DoutTile::bytes);
  }

  /// dP^T once dO is there.
  __device__ __forceinline__ void issue_dout(float (&dp)[score_registers], int stage,
                                             std::uint32_t phase) const {
    ptx::mbarrier_wait(barriers.dout_full + stage, phase);
    ptx::wgmma_fence();
    multiply_dout(dp, stage);
    ptx::wgmma_commit();
  }

  /// x += A B with A in registers and B the query tile at `offset`: dV from P and dO, dK from dS
  /// and Q.
  template <class QueryTile>
  __device__ __forceinline__ void multiply_queries(float (&x)[QueryTile::columns / 2],
                                                   const std::uint32_t (&a)[query_blocks][4],
                                                   int offset) const {
    const std::uint64_t b =
        descriptor::mn_major(ptx::shared_address(smem + offset), QueryTile::slab_bytes);
#pragma unroll
    for (int k = 0; k < query_blocks; ++k) {
      ptx::wgmma_rs<T, QueryTile::columns, ptx::Major::mn>(x, a[k], b + k * descriptor::mn_step, 1);
    }
  }

  /// The products that end a tile, around the hand-over of dS to the dQ group.
  __device__ __forceinline__ void finish_tile(float (&dk)[C::d / 2], float (&dv)[C::dv / 2],
                                              const std::uint32_t (&pa)[query_blocks][4],
                                              const std::uint32_t (&dsa)[query_blocks][4],
                                              const RingPosition<C::stages>& ring) const {
    const int stage = ring.slot;
    multiply_queries<typename C::DoutTile>(dv, pa, Smem::dout + stage * C::DoutTile::bytes);
    if (p.dq_accumulator != nullptr) publish_score_gradients(ring);
    ptx::wgmma_fence();
    multiply_queries<typename C::QueryTile>(dk, dsa, Smem::query + stage * C::QueryTile::bytes);
    ptx::wgmma_commit();
  }

  /// dS^T of this warpgroup into its slab of a dS tile, as [query][key].
  __device__ __forceinline__ void store_score_gradients(const std::uint32_t (&ds)[query_blocks][4],
                                                        const RingPosition<C::stages>& ring) const {
    ptx::mbarrier_wait(barriers.score_empty + ring.slot, ring.phase ^ 1);
    const std::uint32_t address = score + ring.slot * C::ScoreTile::bytes;
#pragma unroll
    for (int k = 0; k < query_blocks; ++k) {
      ptx::store_matrix_x4_transposed(address + k * 16 * slab_row_bytes, ds[k][0], ds[k][1],
                                      ds[k][2], ds[k][3]);
    }
  }

  /// Hands the stored dS to the dQ group.
  __device__ __forceinline__ void publish_score_gradients(
      const RingPosition<C::stages>& ring) const {
    ptx::fence_proxy_async_shared();
    __syncwarp();
    if (ptx::elect_one()) ptx::mbarrier_arrive(barriers.score_full + ring.slot);
  }

  __device__ __forceinline__ void release(int stage) const {
    __syncwarp();
    if (ptx::elect_one())
      ptx::mbarrier_arrive(barriers.stage_empty + stage);  // -> wait in load_tile
  }

  using Statistics = ColumnStatistics<C::queries / 8, Tuning::statistics_window>;

  __device__ __forceinline__ Statistics lse2(int stage) const {
    return Statistics(statistics + stage * C::queries * 4);
  }

  __device__ __forceinline__ Statistics softmax_d(int stage) const {
    return Statistics(statistics + (Smem::softmax_d - Smem::lse2) + stage * C::queries * 4);
  }

  /// Zeros P and dS where a query of the tile does not see a key.
  __device__ __forceinline__ void mask(std::uint32_t (&pa)[query_blocks][4],
                                       std::uint32_t (&dsa)[query_blocks][4], int tile) const {
    const auto* all = reinterpret_cast<const VisibleInterval*>(smem + Smem::intervals);
    const std::uint32_t visible = visible_registers<score_registers>(
        all + C::group_key(group) + warp() * 16 + threadIdx.x % 32 / 4, tile * C::queries,
        threadIdx.x % 4);
    keep_visible(pa, visible);
    keep_visible(dsa, visible);
  }

  __device__ __forceinline__ const BlockFacts& facts() const {
    return *reinterpret_cast<const BlockFacts*>(smem + Smem::facts);
  }

  /// The walk over query tiles.
  struct Position {
    int left;  ///< tiles that follow
    int tile;
    RingPosition<C::stages> ring;

    __device__ __forceinline__ explicit Position(const BlockFacts& facts)
        : left(facts.iterations - 1), tile(facts.tiles.begin) {}

    __device__ __forceinline__ bool masked(const TileRange& full) const {
      return tile < full.begin || tile >= full.end;
    }

    __device__ __forceinline__ void advance(const TileRange& tiles) {
      ring.advance();
      if (++tile == tiles.end) tile = tiles.begin;
    }
  };

  /// P of a tile, rounded and packed as operand, and packed what dS is proportional to: P itself,
  /// with softcap P times the derivative of the cap.
  __device__ __forceinline__ void weights(std::uint32_t (&pa)[query_blocks][4],
                                          std::uint32_t (&wa)[query_blocks][4],
                                          float (&s)[score_registers], Statistics& lse) const {
    if constexpr (C::softcap) {
      capped_probabilities<T>(s, pa, wa, p, lse);
    } else {
      probabilities(s, p, lse);
      hold_wait_below(s);
      pack_operand<T>(pa, s);
    }
  }

  /// One tile after the other; the other warpgroups fill the gaps.
  __device__ __forceinline__ void run_in_order(float (&dk)[C::d / 2],
                                               float (&dv)[C::dv / 2]) const {
    Position at(facts());
    do {
      float s[score_registers], dp[score_registers];
      std::uint32_t pa[query_blocks][4], wa[query_blocks][4], dsa[query_blocks][4];
      const int stage = at.ring.slot;
      ptx::mbarrier_wait(barriers.query_full + stage, at.ring.phase);
      ptx::wgmma_fence();
      multiply_scores(s, stage);
      ptx::wgmma_commit();
      Statistics lse = lse2(stage);
      // With softcap the exponentials need the registers of dP.
      if constexpr (!C::softcap) issue_dout(dp, stage, at.ring.phase);
      ptx::wgmma_wait<C::softcap ? 0 : 1>();  // S
      weights(pa, wa, s, lse);
      if constexpr (C::softcap) issue_dout(dp, stage, at.ring.phase);
      Statistics d = softmax_d(stage);
      const TileRange tiles = facts().tiles, full = facts().full;
      ptx::wgmma_wait<0>();  // dP
      score_gradients<T>(dp, C::softcap ? wa : pa, d);
      pack_operand<T>(dsa, dp);
      if (at.masked(full)) mask(pa, dsa, at.tile);
      if (p.dq_accumulator != nullptr) store_score_gradients(dsa, at.ring);
      ptx::wgmma_fence();
      finish_tile(dk, dv, pa, dsa, at.ring);
      ptx::wgmma_wait<0>();
      release(stage);
      at.advance(tiles);
    } while (at.left-- > 0);
  }

  __device__ __forceinline__ void run() {
    if (facts().iterations == 0) return store_zero_gradients<C>(p);
    ptx::mbarrier_wait(barriers.keys_full, 0);
    float dk[C::d / 2], dv[C::dv / 2];
#pragma unroll
    for (int i = 0; i < C::d / 2; ++i) dk[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < C::dv / 2; ++i) dv[i] = 0.0f;
    run_in_order(dk, dv);
    // Where the block lies is computed again: the loop has no registers to keep it.
    const unsigned thread = opaque(threadIdx.x);
    const int first = C::group_key(static_cast<int>(thread) / 128 - C::first_main_group);
    const KeyPassPlace place(p, opaque(blockIdx.x), C::keys);
    const KeyGradientStore<C> to(p, place, first, thread % 128);
    to.value_columns(dv, 0);
    to.key_columns(dk, 0);
  }
};

}  // namespace sinkattn::hopper
