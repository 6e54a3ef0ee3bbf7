// SPDX-License-Identifier: Apache-2.0
// The main warpgroups of the key pass for large head dims, where dK and dV of 64 keys do not fit
// into the registers of one warpgroup.
//
// A block holds 64 keys. Each of the two main warpgroups computes S^T and dP^T for half of the
// queries of a tile and puts P^T and dS^T into shared memory, as [key][query]; after a barrier of
// the two it adds half of the columns of dV and dK. dQ reads the same dS^T as a transposed operand.
#pragma once

#include "hopper/kernels/backward_keys.cuh"
#include "hopper/kernels/backward_keys_store.cuh"

namespace sinkattn::hopper {

/// How two warpgroups share `Columns` columns: pieces of whole slabs, and the halves of a slab that
/// is left over. An operand must not cross a slab from the middle.
template <int Columns>
struct ColumnShare {
  static constexpr int large = Columns / 128 * 64;
  static constexpr int small = Columns / 2 - large;
  static_assert(small == 0 || small == 32);

  __device__ static int large_start(int group) { return group * (Columns - large); }
  __device__ static int small_start(int group) { return large + group * small; }
};

/// The columns of dK or dV that one warpgroup accumulates.
template <int Columns>
struct SharedColumns {
  using Share = ColumnShare<Columns>;
  float large[Share::large / 2];
  float small[Share::small > 0 ? Share::small / 2 : 1];
};

template <class C>
struct WideKeyPassMain {
  using T = typename C::T;
  using Smem = KeyPassSmem<C>;
  static constexpr int half_queries = C::queries / 2;  ///< queries of S^T per warpgroup
  static constexpr int query_blocks = half_queries / 16;
  static constexpr int score_registers = half_queries / 2;
  static constexpr int barrier_mains = 1;  ///< named barrier of the two main warpgroups

  const BackwardArguments& p;
  const KeyPassBarriers<C>& barriers;
  char* smem;
  int group, warp, lane, quad;

  __device__ __forceinline__ WideKeyPassMain(const BackwardArguments& p_,
                                             const KeyPassBarriers<C>& barriers_, char* smem_)
      : p(p_), barriers(barriers_), smem(smem_) {
    group = static_cast<int>(threadIdx.x) / 128 - C::first_main_group;
    // Opaque, so that they are kept: reading the thread index again in every tile is slow.
    warp = static_cast<int>(opaque(threadIdx.x % 128 / 32));
    lane = static_cast<int>(opaque(threadIdx.x % 32));
    quad = lane % 4;
  }

  __device__ __forceinline__ const BlockFacts& facts() const {
    return *reinterpret_cast<const BlockFacts*>(smem + Smem::facts);
  }

  using Statistics = ColumnStatistics<half_queries / 8, half_queries / 8>;

  __device__ __forceinline__ Statistics statistics(int offset, int stage) const {
    return Statistics(ptx::shared_address(smem + offset) +
                      4 * (stage * C::queries + group * half_queries + 2 * quad));
  }

  /// (64 keys) x (this warpgroup's 32 queries) of A B^T.
  template <class KeyTile, class QueryTile>
  __device__ __forceinline__ void multiply_keys(float (&x)[score_registers], int a_offset,
                                                int b_offset) const {
    const std::uint64_t a = descriptor::k_major(ptx::shared_address(smem + a_offset));
    const std::uint64_t b = descriptor::k_major(ptx::shared_address(smem + b_offset) +
                                                group * half_queries * slab_row_bytes);
#pragma unroll
    for (int k = 0; k < KeyTile::columns / 16; ++k) {
      ptx::wgmma_ss<T, half_queries>(x, a + descriptor::k_step<KeyTile::slab_bytes>(k),
                                     b + descriptor::k_step<QueryTile::slab_bytes>(k), k != 0);
    }
    ptx::wgmma_commit();
  }

  /// x += A B for N columns from `start`: A is P^T or dS^T of the whole tile, B is dO or Q.
  template <int N, class QueryTile>
  __device__ __forceinline__ void multiply_queries(float (&x)[N / 2], int a_offset, int b_offset,
                                                   int start) const {
    const std::uint64_t a = descriptor::k_major(ptx::shared_address(smem + a_offset));
    const std::uint64_t b = descriptor::mn_major(ptx::shared_address(smem + b_offset) +
                                                     start / slab_columns * QueryTile::slab_bytes +
                                                     start % slab_columns * 2,
                                                 QueryTile::slab_bytes);
#pragma unroll
    for (int k = 0; k < C::queries / 16; ++k) {
      ptx::wgmma_ss<T, N, ptx::Major::k, ptx::Major::mn>(
          x, a + descriptor::k_step<C::ScoreTile::slab_bytes>(k), b + k * descriptor::mn_step, 1);
    }
  }

  template <class QueryTile>
  __device__ __forceinline__ void add_columns(SharedColumns<QueryTile::columns>& x, int a_offset,
                                              int b_offset) const {
    using Share = ColumnShare<QueryTile::columns>;
    multiply_queries<Share::large, QueryTile>(x.large, a_offset, b_offset,
                                              Share::large_start(group));
    if constexpr (Share::small > 0) {
      multiply_queries<Share::small, QueryTile>(x.small, a_offset, b_offset,
                                                Share::small_start(group));
    }
  }

  /// P or dS of this warpgroup's queries into its half of a [key][query] tile.
  __device__ __forceinline__ void store_scores(const std::uint32_t (&a)[query_blocks][4],
                                               int offset) const {
    const std::uint32_t tile = ptx::shared_address(smem + offset);
    const int row = warp * 16 + lane % 16;
#pragma unroll
    for (int k = 0; k < query_blocks; ++k) {
      const int chunk = (group * half_queries + 16 * k) / 8 + lane / 16;
      ptx::store_matrix_x4(tile + swizzled_offset(row, chunk), a[k][0], a[k][1], a[k][2], a[k][3]);
    }
  }

  __device__ __forceinline__ void mask(std::uint32_t (&pa)[query_blocks][4],
                                       std::uint32_t (&dsa)[query_blocks][4], int tile) const {
    const auto* all = reinterpret_cast<const VisibleInterval*>(smem + Smem::intervals);
    const std::uint32_t visible = visible_registers<score_registers>(
        all + warp * 16 + lane / 4, tile * C::queries + group * half_queries, quad);
    keep_visible(pa, visible);
    keep_visible(dsa, visible);
  }

  /// P and dS of a tile as packed fragments; S and dP are in flight.
  __device__ __forceinline__ void gradients(std::uint32_t (&pa)[query_blocks][4],
                                            std::uint32_t (&dsa)[query_blocks][4],
                                            float (&s)[score_registers],
                                            float (&dp)[score_registers], int stage) const {
    Statistics lse2 = statistics(Smem::lse2, stage);
    Statistics softmax_d = statistics(Smem::softmax_d, stage);
    if constexpr (C::softcap) {
      std::uint32_t w[query_blocks][4];
      capped_probabilities<T>(s, pa, w, p, lse2);
      ptx::wgmma_wait<0>();  // dP
      score_gradients<T>(dp, w, softmax_d);
    } else {
      probabilities(s, p, lse2);
      hold_wait_below(s);
      ptx::wgmma_wait<0>();  // dP
      score_gradients(dp, s, softmax_d);
      pack_operand<T>(pa, s);
    }
    pack_operand<T>(dsa, dp);
  }

  /// Publishes P and dS of tile: to the other main warpgroup by the named barrier, to the dQ group
  /// by score_full. A slot's last readers among the mains are done: each of them waited for its
  /// products of the tile before last ahead of the barrier of the last tile.
  __device__ __forceinline__ void publish(const std::uint32_t (&pa)[query_blocks][4],
                                          const std::uint32_t (&dsa)[query_blocks][4],
                                          const RingPosition<C::stages>& ring) const {
    if (p.dq_accumulator != nullptr) {
      ptx::mbarrier_wait(barriers.score_empty + ring.slot, ring.phase ^ 1);
    }
    store_scores(pa, Smem::probability + ring.slot * C::probability_bytes);
    store_scores(dsa, Smem::score + ring.slot * C::ScoreTile::bytes);
    ptx::fence_proxy_async_shared();
    __syncwarp();
    if (p.dq_accumulator != nullptr) {
      if (ptx::elect_one()) ptx::mbarrier_arrive(barriers.score_full + ring.slot);
    }
    ptx::named_barrier_sync(barrier_mains, 256);
  }

  __device__ __forceinline__ void run_tiles(SharedColumns<C::d>& dk,
                                            SharedColumns<C::dv>& dv) const {
    static_assert(C::stages >= 2, "see publish()");
    TilePosition<C> at(facts());
    int previous = -1;
    do {
      const RingPosition<C::stages> ring = at.ring;
      float s[score_registers], dp[score_registers];
      std::uint32_t pa[query_blocks][4], dsa[query_blocks][4];
      const int stage = ring.slot;
      ptx::mbarrier_wait(barriers.query_full + stage, ring.phase);
      ptx::wgmma_fence();
      multiply_keys<typename C::KeyTile, typename C::QueryTile>(
          s, Smem::key, Smem::query + stage * C::QueryTile::bytes);
      ptx::mbarrier_wait(barriers.dout_full + stage, ring.phase);
      ptx::wgmma_fence();
      multiply_keys<typename C::ValueTile, typename C::DoutTile>(
          dp, Smem::value, Smem::dout + stage * C::DoutTile::bytes);
      ptx::wgmma_wait<1>();  // S, and dV, dK of the previous tile
      if (previous >= 0) release(previous);
      gradients(pa, dsa, s, dp, stage);
      if (at.masked(facts())) mask(pa, dsa, at.tile);
      publish(pa, dsa, ring);
      ptx::wgmma_fence();
      add_columns<typename C::DoutTile>(dv, Smem::probability + ring.slot * C::probability_bytes,
                                        Smem::dout + stage * C::DoutTile::bytes);
      add_columns<typename C::QueryTile>(dk, Smem::score + ring.slot * C::ScoreTile::bytes,
                                         Smem::query + stage * C::QueryTile::bytes);
      ptx::wgmma_commit();
      previous = stage;
      at.advance(facts());
    } while (at.left-- > 0);
    ptx::wgmma_wait<0>();
  }

  __device__ __forceinline__ void release(int stage) const {
    __syncwarp();
    if (ptx::elect_one())
      ptx::mbarrier_arrive(barriers.stage_empty + stage);  // -> wait in load_tile
  }

  template <int Columns>
  __device__ __forceinline__ static void clear(SharedColumns<Columns>& x) {
    using Share = ColumnShare<Columns>;
#pragma unroll
    for (int i = 0; i < Share::large / 2; ++i) x.large[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < Share::small / 2; ++i) x.small[i] = 0.0f;
  }

  __device__ __forceinline__ void run() const {
    if (facts().iterations == 0) return store_zero_gradients<C>(p);
    ptx::mbarrier_wait(barriers.keys_full, 0);
    SharedColumns<C::d> dk;
    SharedColumns<C::dv> dv;
    clear(dk);
    clear(dv);
    run_tiles(dk, dv);
    const KeyGradientStore<C> to(p, KeyPassPlace(p, opaque(blockIdx.x), C::keys), 0,
                                 opaque(threadIdx.x) % 128);
    using KeyShare = ColumnShare<C::d>;
    using ValueShare = ColumnShare<C::dv>;
    to.value_columns(dv.large, ValueShare::large_start(group));
    if constexpr (ValueShare::small > 0) {
      to.value_columns(dv.small, ValueShare::small_start(group));
    }
    to.key_columns(dk.large, KeyShare::large_start(group));
    if constexpr (KeyShare::small > 0) to.key_columns(dk.small, KeyShare::small_start(group));
  }
};

/// Configuration of the key pass with these main warpgroups.
template <class T_, int D_, int DV_, bool Softcap_, class Tuning_ = WideKeyPassTuning<D_, DV_>>
struct WideKeyPass {
  using T = T_;
  using Tuning = Tuning_;
  static constexpr int d = D_, dv = DV_;
  static constexpr bool softcap = Softcap_, query_group = true, heads_together = true;
  static constexpr bool third_adds_keys = false, descending = false, splits_for_l2 = false;
  static constexpr int queries = backward_tile_queries, keys = 64, warpgroup_keys = 64;
  static constexpr int stages = Tuning::stages;
  static constexpr int threads = 512, first_main_group = 2, releasing_warps = 8, gradient_slots = 0;
  using KeyTile = Tile<keys, d>;
  using ValueTile = Tile<keys, dv>;
  using QueryTile = Tile<queries, d>;
  using DoutTile = Tile<queries, dv>;
  using ScoreTile = Tile<keys, queries>;  ///< P and dS as [key][query]
  static constexpr ptx::Major score_major = ptx::Major::mn;
  static constexpr int probability_bytes = ScoreTile::bytes;
  template <class C>
  using Main = WideKeyPassMain<C>;

  /// Both main warpgroups have all keys.
  __host__ __device__ static constexpr int group_key(int) { return 0; }
};

}  // namespace sinkattn::hopper
