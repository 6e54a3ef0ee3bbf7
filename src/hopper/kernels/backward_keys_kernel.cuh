// SPDX-License-Identifier: Apache-2.0
// The kernel of the key pass: prologue and roles.
#pragma once

#include "hopper/kernels/backward_keys.cuh"
#include "hopper/kernels/backward_keys_joint.cuh"
#include "hopper/kernels/backward_keys_main.cuh"
#include "hopper/kernels/backward_keys_narrow.cuh"
#include "hopper/kernels/backward_keys_wide.cuh"

namespace sinkattn::hopper {

/// The visible rows of the block's keys, for masked tiles; and zeros where nothing is copied.
template <class C>
__device__ __forceinline__ void prepare_block(const BackwardArguments& p, const KeyPassWork& work,
                                              char* smem) {
  using Smem = KeyPassSmem<C>;
  if (threadIdx.x < C::keys) {
    reinterpret_cast<VisibleInterval*>(smem + Smem::intervals)[threadIdx.x] =
        queries_of_key(p.mask, work.place.first_key + static_cast<int>(threadIdx.x),
                       work.sequence.queries.length, work.sequence.keys.length);
  }
  if (threadIdx.x == 0) {
    auto* facts = reinterpret_cast<BlockFacts*>(smem + Smem::facts);
    const SequencePair& sequence = work.sequence;
    facts->tiles = work.tiles;
    facts->step = work.place.ascending ? 1 : -1;
    facts->heads = work.heads;
    facts->iterations = work.iterations;
    facts->before =
        query_tiles(p.mask, max(work.place.first_key - C::keys, 0), work.place.first_key,
                    sequence.queries.length, sequence.keys.length);
    facts->full = full_tiles(p.mask, work.place.first_key, work.place.first_key + C::keys,
                             sequence.queries.length, sequence.keys.length);
  }
  clear_unused<typename C::KeyTile>(smem + Smem::key, 1, p.head_dim);
  clear_unused<typename C::ValueTile>(smem + Smem::value, 1, p.head_dim_v);
  clear_unused<typename C::QueryTile>(smem + Smem::query, C::stages, p.head_dim);
  clear_unused<typename C::DoutTile>(smem + Smem::dout, C::stages, p.has_dout ? p.head_dim_v : 0);
  ptx::fence_proxy_async_shared();
}

/// Moves this warpgroup from the registers of the launch to `Count`.
template <int Count, int Threads>
__device__ __forceinline__ void set_registers() {
  constexpr int launched = Threads == 512 ? 128 : 168;
  if constexpr (Count > launched) {
    ptx::registers_increase<Count>();
  } else {
    ptx::registers_decrease<Count>();
  }
}

template <class C>
__global__ void __launch_bounds__(C::threads, 1)
    backward_keys_kernel(const __grid_constant__ BackwardArguments p) {
  using Tuning = typename C::Tuning;
  extern __shared__ char unaligned[];
  char* smem = unaligned + (1024 - ptx::shared_address(unaligned) % 1024) % 1024;
  const KeyPassWork work(p, KeyPassPlace(p, blockIdx.x, C::keys), C::keys);
  if (work.place.first_key >= work.sequence.keys.length) return;
  const KeyPassBarriers<C> barriers(smem);
  if (threadIdx.x == 0) barriers.init();
  prepare_block<C>(p, work, smem);
  __syncthreads();
  const int group = threadIdx.x / 128;
  if (group == 0) {
    ptx::registers_decrease<Tuning::producer_registers>();
    if (threadIdx.x == 0 && work.iterations > 0) {
      KeyPassProducer<C> producer(p, work, barriers, smem);
      producer.load_keys();
      while (producer.left > 0) producer.load_tile();
    }
    if constexpr (C::gradient_slots > 0) {
      const int writer = static_cast<int>(threadIdx.x) / 32 - 1;
      const bool writes = threadIdx.x % 32 == 0 && writer >= 0 && writer < C::gradient_slots;
      if (writes && p.dq_turns != nullptr) {
        GradientWriter<C>(p, work, barriers, smem, writer).run();
      }
    }
  } else if (group < C::first_main_group) {
    if constexpr (C::query_group) {
      set_registers<Tuning::dq_registers, C::threads>();
      if constexpr (C::third_adds_keys) {
        NarrowThird<C>(p, barriers, smem).run(work);
      } else {
        query_gradient_role<C>(p, barriers, smem);
      }
    }
  } else {
    set_registers<Tuning::main_registers, C::threads>();
    typename C::template Main<C>(p, barriers, smem).run();
  }
}

}  // namespace sinkattn::hopper
