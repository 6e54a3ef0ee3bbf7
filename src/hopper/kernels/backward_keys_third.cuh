// SPDX-License-Identifier: Apache-2.0
// The third warpgroup of the key pass: dQ, and dK where the main warpgroups leave it.
#pragma once

#include "hopper/kernels/backward_keys.cuh"
#include "hopper/kernels/backward_keys_store.cuh"

namespace sinkattn::hopper {

/// Loop of the third warpgroup over the tiles: tile(ring, accumulator, release) does one.
template <class C, class Tile>
__device__ __forceinline__ void for_each_score_tile(const BackwardArguments& p,
                                                    const KeyPassWork& work,
                                                    const KeyPassBarriers<C>& barriers, char* smem,
                                                    const Tile& tile) {
  const bool produces = !C::producer_group && threadIdx.x % 128 == 0;
  KeyPassProducer<C> producer(p, work, barriers, smem);
  if (produces) producer.load_keys();
  QueryWalk walk(p, work);
  RingPosition<C::stages> ring;
  for (int i = 0; i < work.iterations; ++i) {
    wait_for_scores<C>(producer, produces, barriers.score_full + ring.slot, ring.phase);
    if (i == 0) ptx::mbarrier_wait(barriers.keys_full, 0);
    tile(ring, p.dq_accumulator + walk.row * C::d);
    walk.advance();
    ring.advance();
  }
  // Shared memory must outlive the copies from it.
  if (C::Tuning::bulk_reduction && threadIdx.x % 128 == 0) ptx::bulk_wait_read<0>();
}

/// dQ alone; nothing to do where it is not wanted from this pass.
template <class C>
__device__ __forceinline__ void query_gradient_role(const BackwardArguments& p,
                                                    const KeyPassWork& work,
                                                    const KeyPassBarriers<C>& barriers,
                                                    char* smem) {
  if (work.iterations == 0) return;
  if (p.dq_accumulator == nullptr) {
    KeyPassProducer<C> producer(p, work, barriers, smem);
    if (C::producer_group || threadIdx.x % 128 != 0) return;
    producer.load_keys();
    while (producer.left > 0) producer.load_tile();
    return;
  }
  for_each_score_tile<C>(p, work, barriers, smem,
                         [&](const RingPosition<C::stages>& ring, float* accumulator) {
                           add_query_gradients<C>(smem, ring.slot, accumulator, [&] {
                             __syncwarp();
                             if (ptx::elect_one())
                               ptx::mbarrier_arrive(barriers.score_empty + ring.slot);
                           });
                         });
}

/// dK and, where it is wanted from this pass, dQ.
template <class C>
__device__ __forceinline__ void key_gradient_role(const BackwardArguments& p,
                                                  const KeyPassWork& work,
                                                  const KeyPassBarriers<C>& barriers, char* smem) {
  if (work.iterations == 0) return;  // the main warpgroups store the zeros
  float dk[2][C::d / 2];
#pragma unroll
  for (int i = 0; i < C::d / 2; ++i) dk[0][i] = dk[1][i] = 0.0f;
  for_each_score_tile<C>(p, work, barriers, smem,
                         [&](const RingPosition<C::stages>& ring, float* accumulator) {
                           const auto release = [&] {
                             __syncwarp();
                             if (ptx::elect_one()) {
                               ptx::mbarrier_arrive(barriers.score_empty + ring.slot);
                               ptx::mbarrier_arrive(barriers.stage_empty + ring.slot);
                             }
                           };
                           ptx::mbarrier_wait(barriers.query_full + ring.slot, ring.phase);
                           multiply_key_gradients<C>(dk, smem, ring.slot);
                           if (p.dq_accumulator != nullptr) {
                             add_query_gradients<C>(smem, ring.slot, accumulator, release);
                           } else {
                             ptx::wgmma_wait<0>();
                             release();
                           }
                         });
  // Where the block lies is computed again: the loop has no registers to keep it.
  const KeyPassPlace place(p, opaque(blockIdx.x), C::keys);
#pragma unroll
  for (int group = 0; group < 2; ++group) {
    const KeyGradientStore<C> to(p, place, C::group_key(group), opaque(threadIdx.x) % 128);
    to.key_columns(dk[group], 0);
  }
}

}  // namespace sinkattn::hopper
