// SPDX-License-Identifier: Apache-2.0
// The key pass at head dim 64, where the exponentials weigh most: the main warpgroups do as few
// products as they can, and dK goes to the third warpgroup.
//
//   main warpgroups, 64 keys each      S^T = K Q^T, dP^T = V dO^T, K and V in registers
//                                      P = exp2(S c - LSE2), dS = P (dP - D'), dV += P^T dO
//       | dS as [query][key], ring in shared memory
//       v
//   third warpgroup, 128 keys          dQ^T = K^T dS^T, added to the accumulator or handed to a
//                                      writer; dK^T += Q^T dS
//
// A warp that issues a product is held up until the products before it are nearly done, so what
// counts in a main warpgroup is the number of products. The results of the third warpgroup are
// transposed so that the long operand, 128 keys, is B: fewer reads of shared memory per product.
#pragma once

#include "hopper/kernels/backward_main_warpgroup.cuh"

namespace sinkattn::hopper {

/// A main warpgroup: 64 keys.
template <class C>
struct NarrowMain : MainWarpgroup<C, C::Tuning::statistics_window> {
  using Base = MainWarpgroup<C, C::Tuning::statistics_window>;
  using Base::barriers;
  using Base::Base;
  using Base::facts;
  using Base::group;
  using Base::lse2;
  using Base::p;
  using Base::publish_score_gradients;
  using Base::query_blocks;
  using Base::release;
  using Base::score_registers;
  using Base::smem;
  using Base::softmax_d;
  using Base::visible_queries;
  using Base::warp;
  using typename Base::Packed;
  using typename Base::Scores;
  using typename Base::Statistics;
  using T = typename C::T;
  using Smem = KeyPassSmem<C>;

  std::uint32_t key_operand[C::d / 16][4], value_operand[C::dv / 16][4];

  /// This warpgroup's rows of K or V as register operand A.
  template <int Blocks>
  __device__ __forceinline__ void load_operand(std::uint32_t (&a)[Blocks][4], int offset) const {
    const int lane = threadIdx.x % 32;
    const int row = group * C::warpgroup_keys + warp() * 16 + lane % 16;
    const std::uint32_t base = ptx::shared_address(smem + offset);
#pragma unroll
    for (int k = 0; k < Blocks; ++k) {
      ptx::load_matrix_x4(a[k], base + swizzled_offset(row, 2 * k + lane / 16));
    }
  }

  /// x = A B^T, (64 keys) x (64 queries): S^T from K and Q, dP^T from V and dO.
  template <int Blocks>
  __device__ __forceinline__ void multiply_keys(Scores& x, const std::uint32_t (&a)[Blocks][4],
                                                int b_offset) const {
    const std::uint64_t b = descriptor::k_major(ptx::shared_address(smem + b_offset));
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < Blocks; ++k) {
      ptx::wgmma_rs<T, C::queries>(x, a[k], b + descriptor::k_step<C::QueryTile::slab_bytes>(k),
                                   k != 0);
    }
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void issue_scores(Scores& s, int stage) const {
    multiply_keys(s, key_operand, Smem::query + stage * C::QueryTile::bytes);
  }

  __device__ __forceinline__ void issue_dout(Scores& dp, int stage) const {
    multiply_keys(dp, value_operand, Smem::dout + stage * C::DoutTile::bytes);
  }

  /// dV += P^T dO.
  __device__ __forceinline__ void issue_values(float (&dv)[C::dv / 2], const Packed& pa,
                                               int stage) const {
    const std::uint64_t b =
        descriptor::mn_major(ptx::shared_address(smem + Smem::dout + stage * C::DoutTile::bytes),
                             C::DoutTile::slab_bytes);
#pragma unroll
    for (int k = 0; k < query_blocks; ++k) {
      ptx::wgmma_rs<T, C::dv, ptx::Major::mn>(dv, pa[k], b + k * descriptor::mn_step, 1);
    }
    ptx::wgmma_commit();
  }

  /// dS to the third warpgroup. The slot is free: its last reader released Q's stage along with it.
  __device__ __forceinline__ void publish(const Packed& ds, int slot) const {
    this->store_score_gradients(ds, slot);
    publish_score_gradients(slot);
  }

  /// With softcap: P, packed, and packed what dS is proportional to, P times the derivative of the
  /// cap.
  __device__ __forceinline__ void capped_weights(Packed& pa, Packed& wa, const Scores& s,
                                                 std::uint32_t lse) const {
#pragma unroll
    for (int k = 0; k < query_blocks; ++k) {
      ColumnStatistics<2, 2> block(lse + 64 * k);
      capped_probabilities<T>(reinterpret_cast<const float (&)[8]>(s[8 * k]),
                              reinterpret_cast<std::uint32_t (&)[1][4]>(pa[k]),
                              reinterpret_cast<std::uint32_t (&)[1][4]>(wa[k]), p, block);
      // ptxas would have the intermediate values of all blocks in registers; it moves none over a
      // branch. No probability has a sign.
      if (static_cast<int>(pa[k][0] | pa[k][1] | pa[k][2] | pa[k][3]) < 0) __trap();
    }
  }

  /// On entry to a tile its S is there and dV of the last tile is in flight.
  __device__ __forceinline__ void run_tiles(float (&dv)[C::dv / 2]) const {
    Scores s, dp;
    RingPosition<C::stages> ring;
    const TileRange tiles = facts().tiles;
    int left = facts().iterations;
    int tile = tiles.end - 1;
    int previous = -1;
    ptx::mbarrier_wait(barriers.query_full, 0);
    issue_scores(s, 0);
    Statistics lse = lse2(0);
    ptx::wgmma_wait<0>();
    do {
      Packed pa, wa, dsa;
      const int stage = ring.slot;
      // With softcap the exponentials need the registers of dP.
      if constexpr (C::softcap) capped_weights(pa, wa, s, lse.address);
      ptx::mbarrier_wait(barriers.dout_full + stage, ring.phase);
      issue_dout(dp, stage);
      if constexpr (!C::softcap) {
        probabilities(s, p, lse);
        hold_wait_below(s);
      }
      ptx::wgmma_wait<1>();  // dV of the previous tile
      if (previous >= 0) release(previous);
      if constexpr (!C::softcap) pack_operand<T>(pa, s);
      Statistics d = softmax_d(stage);
      const TileRange full = facts().full;
      ptx::wgmma_wait<0>();  // dP
      if constexpr (C::softcap) {
        score_gradients<T>(dp, wa, d);
      } else {
        score_gradients(dp, s, d);
      }
      pack_operand<T>(dsa, dp);
      if (tile < full.begin || tile >= full.end) {
        const std::uint32_t bits = visible_queries(tile);
        keep_visible(pa, bits);
        keep_visible(dsa, bits);
      }
      publish(dsa, stage);
      previous = stage;
      ring.advance();
      if (--tile < tiles.begin) tile = tiles.end - 1;
      // After the last tile S of a stale stage is computed and dropped: no issue in a branch.
      if (--left > 0) ptx::mbarrier_wait(barriers.query_full + ring.slot, ring.phase);
      issue_scores(s, ring.slot);
      issue_values(dv, pa, stage);
      lse = lse2(ring.slot);
      // S of the next tile; with softcap also dV, whose operand is written next.
      ptx::wgmma_wait<C::softcap ? 0 : 1>();
    } while (left > 0);
    ptx::wgmma_wait<0>();
  }

  __device__ __forceinline__ void run() {
    if (facts().iterations == 0) return store_zero_gradients<C>(p);
    ptx::mbarrier_wait(barriers.keys_full, 0);
    load_operand(key_operand, Smem::key);
    load_operand(value_operand, Smem::value);
    float dv[C::dv / 2];
#pragma unroll
    for (int i = 0; i < C::dv / 2; ++i) dv[i] = 0.0f;
    run_tiles(dv);
    // Where the block lies is computed again: the loop has no registers to keep it.
    const unsigned thread = opaque(threadIdx.x);
    const int first = C::group_key(static_cast<int>(thread) / 128 - C::first_main_group);
    const KeyPassPlace place(p, opaque(blockIdx.x), C::keys);
    KeyGradientStore<C>(p, place, first, thread % 128).value_columns(dv, 0);
  }
};

/// What becomes of dQ of a tile: no one wants it, the third warpgroup adds it to the accumulator,
/// or a writer does, in turn.
enum class QueryGradient { none, added, handed_over };

/// The third warpgroup.
template <class C>
struct NarrowThird {
  using T = typename C::T;
  using Smem = KeyPassSmem<C>;
  static_assert(C::d == 64, "the head dim is the extent M of every product");
  static constexpr int key_blocks = C::keys / 16;
  static constexpr int query_blocks = C::queries / 16;
  using KeyColumns = float[C::keys / 2];  ///< dK^T

  const BackwardArguments& p;
  const KeyPassBarriers<C>& barriers;
  char* smem;

  __device__ __forceinline__ NarrowThird(const BackwardArguments& p_,
                                         const KeyPassBarriers<C>& barriers_, char* smem_)
      : p(p_), barriers(barriers_), smem(smem_) {}

  __device__ __forceinline__ const BlockFacts& facts() const {
    return *reinterpret_cast<const BlockFacts*>(smem + Smem::facts);
  }

  /// dQ^T = K^T dS^T.
  __device__ __forceinline__ void issue_queries(float (&dq)[C::queries / 2], int slot) const {
    const std::uint64_t score =
        descriptor::k_major(ptx::shared_address(smem + Smem::score + slot * C::ScoreTile::bytes));
    const std::uint64_t key =
        descriptor::mn_major(ptx::shared_address(smem + Smem::key), C::KeyTile::slab_bytes);
#pragma unroll
    for (int k = 0; k < key_blocks; ++k) {
      ptx::wgmma_ss<T, C::queries, ptx::Major::mn>(
          dq, key + k * descriptor::mn_step,
          score + descriptor::k_step<C::ScoreTile::slab_bytes>(k), k != 0);
    }
    ptx::wgmma_commit();
  }

  /// dK^T += Q^T dS.
  __device__ __forceinline__ void issue_keys(KeyColumns& dk, int slot) const {
    const std::uint64_t query =
        descriptor::mn_major(ptx::shared_address(smem + Smem::query + slot * C::QueryTile::bytes),
                             C::QueryTile::slab_bytes);
    const std::uint64_t score =
        descriptor::mn_major(ptx::shared_address(smem + Smem::score + slot * C::ScoreTile::bytes),
                             C::ScoreTile::slab_bytes);
#pragma unroll
    for (int k = 0; k < query_blocks; ++k) {
      ptx::wgmma_ss<T, C::keys, ptx::Major::mn, ptx::Major::mn>(dk, query + k * descriptor::mn_step,
                                                                score + k * descriptor::mn_step, 1);
    }
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void release(int slot) const {
    __syncwarp();
    if (ptx::elect_one()) ptx::mbarrier_arrive(barriers.stage_empty + slot);
  }

  /// The accumulator is in fragment order, see the finish kernel.
  __device__ __forceinline__ static void add_queries(const float (&dq)[C::queries / 2],
                                                     float* accumulator) {
#pragma unroll
    for (int j = 0; j < C::queries / 8; ++j) {
      ptx::reduce_add(accumulator + j * 128 * 4, dq[4 * j], dq[4 * j + 1], dq[4 * j + 2],
                      dq[4 * j + 3]);
    }
  }

  /// dQ of a tile to a writer, which adds it in turn.
  __device__ __forceinline__ void hand_over(const float (&dq)[C::queries / 2],
                                            RingPosition<C::gradient_slots>& out) const {
    ptx::mbarrier_wait(barriers.gradient_empty + out.slot, out.phase ^ 1);
    auto* to = reinterpret_cast<float4*>(smem + Smem::gradient + out.slot * C::queries * C::d * 4) +
               threadIdx.x % 128;
#pragma unroll
    for (int j = 0; j < C::queries / 8; ++j) {
      to[j * 128] = make_float4(dq[4 * j], dq[4 * j + 1], dq[4 * j + 2], dq[4 * j + 3]);
    }
    ptx::fence_proxy_async_shared();
    __syncwarp();
    if (ptx::elect_one()) ptx::mbarrier_arrive(barriers.gradient_full + out.slot);
    out.advance();
  }

  /// `accumulator`: where this thread adds to the first tile.
  template <QueryGradient Queries>
  __device__ __forceinline__ void run_tiles(KeyColumns& dk, float* accumulator) const {
    constexpr int tile_floats = C::queries * C::d;
    RingPosition<C::stages> ring;
    int left = facts().iterations;
    int left_of_head = facts().tiles.end - facts().tiles.begin;
    int previous = -1;
    RingPosition<C::gradient_slots> out;
    do {
      float dq[C::queries / 2];
      ptx::mbarrier_wait(barriers.score_full + ring.slot, ring.phase);
      ptx::wgmma_fence();
      if constexpr (Queries != QueryGradient::none) issue_queries(dq, ring.slot);
      issue_keys(dk, ring.slot);
      ptx::wgmma_wait<1>();  // dQ; dK of the previous tile
      if (previous >= 0) release(previous);
      if constexpr (Queries == QueryGradient::added) add_queries(dq, accumulator);
      if constexpr (Queries == QueryGradient::handed_over) hand_over(dq, out);
      previous = ring.slot;
      ring.advance();
      accumulator -= tile_floats;
      if (--left_of_head == 0) {
        left_of_head = facts().tiles.end - facts().tiles.begin;
        accumulator += p.statistic_rows * C::d + left_of_head * tile_floats;
      }
    } while (--left > 0);
    ptx::wgmma_wait<0>();
  }

  /// A transposed gradient to the rows of its keys.
  __device__ __forceinline__ void store(const KeyColumns& x, const KeyPassPlace& at, float scale,
                                        const HeadsTensor& tensor, int columns,
                                        float* partial) const {
    if (tensor.data == nullptr) return;
    const SequenceInfo keys = resolve_sequence(p.side_k, at.b);
    const int lane = threadIdx.x % 32;
    const int first_column = static_cast<int>(threadIdx.x) % 128 / 32 * 16;
#pragma unroll
    for (int i = 0; i < C::keys / 4; ++i) {
      const int block = at.first_key + i / 2 * 8;
      const int column = first_column + i % 2 * 8;
      if (partial != nullptr) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int key = block + lane % 4 * 2 + j;
          if (key >= keys.length) continue;
          partial[partial_row(p, at, keys.first_row + key) * C::d + column + lane / 4] =
              x[2 * i + j];
        }
        continue;
      }
      const std::uint32_t pair =
          ptx::transpose_matrix(ptx::pack<T>(x[2 * i] * scale, x[2 * i + 1] * scale));
      const int key = block + lane / 4;
      if (key >= keys.length || column >= columns) continue;
      T* to = static_cast<T*>(tensor.data) +
              tensor.offset(p.packed_k ? 0 : at.b, keys.first_row + key, at.kv_head);
      *reinterpret_cast<std::uint32_t*>(to + column + lane % 4 * 2) = pair;
    }
  }

  __device__ __forceinline__ void run(const KeyPassWork& work) {
    if (work.iterations == 0) return;
    ptx::mbarrier_wait(barriers.keys_full, 0);
    KeyColumns dk;
#pragma unroll
    for (int i = 0; i < C::keys / 2; ++i) dk[i] = 0.0f;
    if (p.dq_accumulator != nullptr) {
      const std::int64_t row = work.sequence.statistics(p, work.first_head) +
                               (work.tiles.end - 1) * std::int64_t{C::queries};
      float* first = p.dq_accumulator + row * C::d + threadIdx.x % 128 * 4;
      if (p.dq_turns != nullptr) {
        run_tiles<QueryGradient::handed_over>(dk, first);
      } else {
        run_tiles<QueryGradient::added>(dk, first);
      }
    } else {
      run_tiles<QueryGradient::none>(dk, nullptr);
    }
    const KeyPassPlace place(p, opaque(blockIdx.x), C::keys);
    store(dk, place, p.softmax_scale, p.dk, p.head_dim, p.dk_partial);
  }
};

/// A thread that adds every `gradient_slots`-th tile of dQ to the accumulator, in deterministic
/// mode. The blocks of the keys of a sequence take turns at each tile, in the order of the keys: a
/// block waits only for the block before it, which was launched earlier, and all walk the same way.
template <class C>
struct GradientWriter {
  static constexpr int tile_floats = C::queries * C::d;
  const KeyPassBarriers<C>& barriers;
  const BlockFacts& facts;
  int writer, key_tile;
  float* to;               ///< of the tile in the accumulator
  int* turns;              ///< of the tile: blocks that have added
  std::int64_t head_step;  ///< from the last tile of a head to the first of the next, in tiles
  std::uint32_t source;

  __device__ GradientWriter(const BackwardArguments& p, const KeyPassWork& work,
                            const KeyPassBarriers<C>& barriers_, char* smem, int writer_)
      : barriers(barriers_),
        facts(*reinterpret_cast<const BlockFacts*>(smem + KeyPassSmem<C>::facts)),
        writer(writer_),
        key_tile(work.place.first_key / C::keys) {
    const std::int64_t tile =
        work.sequence.statistics(p, work.first_head) / C::queries + work.tiles.end - 1;
    to = p.dq_accumulator + tile * tile_floats;
    turns = p.dq_turns + tile;
    head_step = p.statistic_rows / C::queries + (work.tiles.end - work.tiles.begin);
    source = ptx::shared_address(smem + KeyPassSmem<C>::gradient + writer * tile_floats * 4);
  }

  /// Waits until the block before has added to the tile, if it does.
  __device__ void wait_for_turn(int tile) const {
    if (tile < facts.before.begin || tile >= facts.before.end) return;
    while (ptx::load_acquire(turns) != key_tile) {
    }
    ptx::fence_proxy_async();
  }

  /// Ends a turn once its addition is complete.
  __device__ void pass(int* turn) const {
    ptx::bulk_wait<0>();
    ptx::fence_proxy_async();
    ptx::store_release(turn, key_tile + 1);
  }

  __device__ void add(std::uint32_t phase) const {
    ptx::mbarrier_wait(barriers.gradient_full + writer, phase);
    ptx::bulk_reduce_add(to, source, tile_floats * 4);
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
    ptx::mbarrier_arrive(barriers.gradient_empty + writer);
  }

  __device__ void step(std::int64_t tiles) {
    to += tiles * tile_floats;
    turns += tiles;
  }

  __device__ void run() {
    int tile = facts.tiles.end;
    int* last = nullptr;  ///< the turn that is still to end: its addition runs meanwhile
    std::uint32_t phase = 0;
    for (int i = 0; i < facts.iterations; ++i) {
      if (i > 0) step(-1);
      if (--tile < facts.tiles.begin) {
        tile = facts.tiles.end - 1;
        step(head_step);
      }
      if (i % C::gradient_slots != writer) continue;
      wait_for_turn(tile);
      if (last != nullptr) pass(last);
      add(phase);
      last = turns;
      phase ^= 1;
    }
    if (last != nullptr) pass(last);
  }
};

/// Configuration of the key pass with these warpgroups.
template <class T_, int D_, int DV_, bool Softcap_, class Tuning_ = NarrowKeyPassTuning>
struct NarrowKeyPass {
  using T = T_;
  using Tuning = Tuning_;
  static constexpr int d = D_, dv = DV_;
  static constexpr bool softcap = Softcap_, query_group = true, third_adds_keys = true;
  static constexpr bool heads_together = false, descending = true, splits_for_l2 = false;
  static constexpr int queries = backward_tile_queries, keys = 128, warpgroup_keys = 64;
  static constexpr int stages = Tuning::stages;
  static constexpr int threads = 512, first_main_group = 2;
  static constexpr int releasing_warps = 12, gradient_slots = Tuning::gradient_slots;
  using KeyTile = Tile<keys, d>;
  using ValueTile = Tile<keys, dv>;
  using QueryTile = Tile<queries, d>;
  using DoutTile = Tile<queries, dv>;
  using ScoreTile = Tile<queries, keys>;  ///< dS as [query][key], a slab per main warpgroup
  static constexpr ptx::Major score_major = ptx::Major::k;
  static constexpr int probability_bytes = 0;
  template <class C>
  using Main = NarrowMain<C>;

  /// First key, in the block's tile, of a main warpgroup.
  __host__ __device__ static constexpr int group_key(int group) { return group * warpgroup_keys; }
};

}  // namespace sinkattn::hopper
