// SPDX-License-Identifier: Apache-2.0
// The main warpgroups of the key pass: 64 keys each, from scores to dS, dV and dK.
#pragma once

#include "hopper/kernels/backward_main_warpgroup.cuh"

namespace sinkattn::hopper {

/// One main warpgroup: 64 keys.
template <class C>
struct KeyPassMain : MainWarpgroup<C, C::Tuning::statistics_window / (C::softcap ? 4 : 1)> {
  using Base = MainWarpgroup<C, C::Tuning::statistics_window / (C::softcap ? 4 : 1)>;
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
  using typename Base::Statistics;
  using T = typename C::T;
  using Smem = KeyPassSmem<C>;

  /// Where registers are scarcest what is computed from it is not kept.
  __device__ __forceinline__ std::uint32_t smem_base() const {
    const std::uint32_t base = ptx::shared_address(smem);
    return C::query_group ? base : opaque(base);
  }

  /// (64 keys) x (64 queries) of A B^T: S^T from K and Q, dP^T from V and dO.
  template <class KeyTile, class QueryTile>
  __device__ __forceinline__ void multiply_keys(float (&x)[score_registers], int a_offset,
                                                int b_offset) const {
    const std::uint32_t base = smem_base();
    const std::uint64_t a =
        descriptor::k_major(base + a_offset + group * C::warpgroup_keys * slab_row_bytes);
    const std::uint64_t b = descriptor::k_major(base + b_offset);
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
    const std::uint64_t b = descriptor::mn_major(smem_base() + offset, QueryTile::slab_bytes);
#pragma unroll
    for (int k = 0; k < query_blocks; ++k) {
      ptx::wgmma_rs<T, QueryTile::columns, ptx::Major::mn>(x, a[k], b + k * descriptor::mn_step, 1);
    }
  }

  /// dS^T into a dS tile once its slot is free.
  __device__ __forceinline__ void store_when_free(const std::uint32_t (&ds)[query_blocks][4],
                                                  const RingPosition<C::stages>& ring) const {
    ptx::mbarrier_wait(barriers.score_empty + ring.slot, ring.phase ^ 1);
    this->store_score_gradients(ds, ring.slot);
  }

  using Position = TilePosition<C>;

  /// P of a tile, rounded and packed as operand, and packed what dS is proportional to: P itself,
  /// with softcap P times the derivative of the cap.
  __device__ __forceinline__ void weights(std::uint32_t (&pa)[query_blocks][4],
                                          std::uint32_t (&wa)[query_blocks][4],
                                          float (&s)[score_registers], Statistics& lse) const {
    if constexpr (C::softcap) {
      capped_probabilities<T>(s, pa, wa, p, lse);
    } else {
      probabilities(s, p, lse);
      pack_operand<T>(pa, s);
    }
  }

  /// One tile after the other, and in a tile P before dP: S and dP are never alive together, which
  /// leaves registers to have LSE2 and D' at hand. dS is formed under dV; the other warpgroups fill
  /// the remaining gaps.
  __device__ __forceinline__ void step_in_order(float (&dk)[C::d / 2], float (&dv)[C::dv / 2],
                                                Position& at) const {
    const RingPosition<C::stages> ring = at.ring;
    const int stage = ring.slot;
    const bool masked = at.masked(facts());
    std::uint32_t pa[query_blocks][4], wa[query_blocks][4], dsa[query_blocks][4];
    std::uint32_t visible = 0;
    float s[score_registers], dp[score_registers];
    ptx::mbarrier_wait(barriers.query_full + stage, ring.phase);
    ptx::wgmma_fence();
    multiply_scores(s, stage);
    ptx::wgmma_commit();
    Statistics lse = lse2(stage);
    ptx::wgmma_wait<0>();
    weights(pa, wa, s, lse);
    if (masked) {
      visible = visible_queries(at.tile);
      keep_visible(pa, visible);
    }
    ptx::mbarrier_wait(barriers.dout_full + stage, ring.phase);
    ptx::wgmma_fence();
    if constexpr (C::softcap) {
      // Not together with dP: P, what dS is formed from, and dP are too many registers.
      multiply_queries<typename C::DoutTile>(dv, pa, Smem::dout + stage * C::DoutTile::bytes);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::wgmma_fence();
      multiply_dout(dp, stage);
      ptx::wgmma_commit();
    } else {
      multiply_dout(dp, stage);
      ptx::wgmma_commit();
      multiply_queries<typename C::DoutTile>(dv, pa, Smem::dout + stage * C::DoutTile::bytes);
      ptx::wgmma_commit();
    }
    Statistics d = softmax_d(stage);
    ptx::wgmma_wait<C::softcap ? 0 : 1>();  // dP
    score_gradients<T>(dp, C::softcap ? wa : pa, d);
    pack_operand<T>(dsa, dp);
    if (masked) keep_visible(dsa, visible);
    if (p.dq_accumulator != nullptr) {
      store_when_free(dsa, ring);
      publish_score_gradients(ring.slot);
    }
    ptx::wgmma_fence();
    multiply_queries<typename C::QueryTile>(dk, dsa, Smem::query + stage * C::QueryTile::bytes);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    release(stage);
    at.advance(facts());
  }

  __device__ __forceinline__ void run_in_order(float (&dk)[C::d / 2],
                                               float (&dv)[C::dv / 2]) const {
    Position at(facts());
    do {
      step_in_order(dk, dv, at);
    } while (at.left-- > 0);
  }

  /// Clears dK and dV, runs `tiles` on them, and stores them.
  template <class Tiles>
  __device__ __forceinline__ void run_with(const Tiles& tiles) const {
    if (facts().iterations == 0) return store_zero_gradients<C>(p);
    ptx::mbarrier_wait(barriers.keys_full, 0);
    float dk[C::d / 2], dv[C::dv / 2];
#pragma unroll
    for (int i = 0; i < C::d / 2; ++i) dk[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < C::dv / 2; ++i) dv[i] = 0.0f;
    tiles(dk, dv);
    // Where the block lies is computed again: the loop has no registers to keep it.
    const unsigned thread = opaque(threadIdx.x);
    const int first = C::group_key(static_cast<int>(thread) / 128 - C::first_main_group);
    const KeyPassPlace place(p, opaque(blockIdx.x), C::keys);
    const KeyGradientStore<C> to(p, place, first, thread % 128);
    to.value_columns(dv, 0);
    to.key_columns(dk, 0);
  }

  __device__ __forceinline__ void run() {
    run_with([&](float (&dk)[C::d / 2], float (&dv)[C::dv / 2]) { run_in_order(dk, dv); });
  }
};

}  // namespace sinkattn::hopper
