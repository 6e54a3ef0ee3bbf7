// SPDX-License-Identifier: Apache-2.0
// The main warpgroups of the key pass where dK and dV of 128 keys take so many registers that none
// are left for a warpgroup of dQ: each main warpgroup also adds half of the columns of dQ.
//
// dQ needs dS of both, so it is formed one tile later, when the other's dS has long been there:
// the two need not go in step.
#pragma once

#include "hopper/kernels/backward_keys_main.cuh"
#include "hopper/kernels/backward_keys_wide.cuh"

namespace sinkattn::hopper {

template <class C>
struct JointKeyPassMain : KeyPassMain<C> {
  using Base = KeyPassMain<C>;
  using Base::barriers;
  using Base::Base;
  using Base::group;
  using Base::p;
  using Base::smem;
  using typename Base::Position;
  using T = typename C::T;
  using Smem = KeyPassSmem<C>;
  using Share = ColumnShare<C::d>;
  using Ring = RingPosition<C::stages>;
  static_assert(C::stages == 2, "before()");

  __device__ __forceinline__ static Ring before(Ring ring) {
    ring.slot ^= 1;
    ring.phase ^= ring.slot;
    return ring;
  }

  /// N columns of dS K from `start`. Addresses are opaque, so that they are computed here: there
  /// are no registers to keep them.
  template <int N>
  __device__ __forceinline__ void multiply_columns(float (&dq)[N / 2], int slot, int start) const {
    const std::uint32_t base = this->smem_base();
    const unsigned column = opaque(start);
    constexpr int slab = C::KeyTile::slab_bytes;
    const std::uint64_t a = descriptor::k_major(base + Smem::score + slot * C::ScoreTile::bytes);
    const std::uint64_t b =
        descriptor::mn_major(base + Smem::key + column / 64 * slab + column % 64 * 2, slab);
#pragma unroll
    for (int k = 0; k < C::keys / 16; ++k) {
      ptx::wgmma_ss<T, N, ptx::Major::k, ptx::Major::mn>(
          dq, a + descriptor::k_step<C::ScoreTile::slab_bytes>(k), b + k * descriptor::mn_step,
          k != 0);
    }
  }

  template <int N>
  __device__ __forceinline__ static void add_columns(const float (&dq)[N], float* to) {
#pragma unroll
    for (int j = 0; j < N / 4; ++j) {
      ptx::reduce_add(to + j * 512, dq[4 * j], dq[4 * j + 1], dq[4 * j + 2], dq[4 * j + 3]);
    }
  }

  /// This warpgroup's columns of dQ of the tile whose dS is at `ring`; `left` as in tile_row().
  /// Nothing else of this warpgroup is in flight.
  __device__ __forceinline__ void add_query_gradients(const Ring& ring, int left) const {
    SharedColumns<C::d> dq;
    ptx::mbarrier_wait(barriers.score_full + ring.slot, ring.phase);  // <- publish
    ptx::wgmma_fence();
    multiply_columns<Share::large>(dq.large, ring.slot, Share::large_start(group));
    if constexpr (Share::small > 0) {
      multiply_columns<Share::small>(dq.small, ring.slot, Share::small_start(group));
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    __syncwarp();
    if (ptx::elect_one()) ptx::mbarrier_arrive(barriers.score_empty + ring.slot);
    const std::int64_t row = *tile_row<C>(smem, left);
    float* to = p.dq_accumulator + row * C::d + opaque(threadIdx.x) % 128 * 4;
    add_columns(dq.large, to + Share::large_start(group) * 64);
    if constexpr (Share::small > 0) add_columns(dq.small, to + Share::small_start(group) * 64);
  }

  __device__ __forceinline__ void run_tiles(float (&dk)[C::d / 2], float (&dv)[C::dv / 2]) const {
    Position at(this->facts());
    bool first = true;
    do {
      const Ring ring = at.ring;
      this->step_in_order(dk, dv, at);
      if (p.dq_accumulator != nullptr && !first) add_query_gradients(before(ring), at.left + 2);
      first = false;
    } while (at.left-- > 0);
    if (p.dq_accumulator != nullptr) add_query_gradients(before(at.ring), 1);
  }

  __device__ __forceinline__ void run() {
    this->run_with([&](float (&dk)[C::d / 2], float (&dv)[C::dv / 2]) { run_tiles(dk, dv); });
  }
};

/// Configuration of the key pass with these main warpgroups.
template <class T_, int D_, int DV_, bool Softcap_, class Tuning_ = JointKeyPassTuning<D_, DV_>>
struct JointKeyPass : KeyPass<T_, D_, DV_, Softcap_, Tuning_> {
  static constexpr bool query_group = false, heads_together = true, splits_for_l2 = false;
  static constexpr int threads = 384, first_main_group = 1;
  template <class C>
  using Main = JointKeyPassMain<C>;
};

}  // namespace sinkattn::hopper
