// SPDX-License-Identifier: Apache-2.0
// The general forward kernel. One block per SM walks over tiles of query rows of one head: a
// producer warp fills rings of Q, K and V tiles through the copy engine, warpgroups of 64 rows each
// consume them. docs/forward.md explains the design with a picture.
#pragma once

#include "hopper/kernels/forward_config.h"
#include "hopper/kernels/forward_consumer.cuh"
#include "hopper/kernels/forward_pages.cuh"
#include "hopper/kernels/forward_producer.cuh"

namespace sinkattn::hopper {

template <class C>
__device__ inline void initialize_barriers(ForwardSmem<C>& smem) {
  constexpr int warps = 4 * C::warpgroups;
  for (int i = 0; i < C::query_stages; ++i) {
    ptx::mbarrier_init(&smem.tile_full[i], 1);
    ptx::mbarrier_init(&smem.query_full[i], 1);
    ptx::mbarrier_init(&smem.query_empty[i], warps + (C::paged ? 1 : 0));
  }
  for (int i = 0; i < C::stages; ++i) {
    ptx::mbarrier_init(&smem.key_full[i], 1);
    ptx::mbarrier_init(&smem.value_full[i], 1);
    ptx::mbarrier_init(&smem.key_empty[i], C::warpgroups);
    ptx::mbarrier_init(&smem.value_empty[i], C::warpgroups);
  }
  ptx::mbarrier_init(&smem.page_full, 1);
  ptx::mbarrier_init_fence();
}

/// Zeroes slabs from `used` on in `Stages` tiles of type T. All threads of the block.
template <class T, int Stages>
__device__ inline void clear_unused_slabs(unsigned char (&tiles)[Stages][T::bytes], int used) {
  for (int stage = 0; stage < Stages; ++stage) {
    for (int at = used * T::slab_bytes + 16 * static_cast<int>(threadIdx.x); at < T::bytes;
         at += 16 * static_cast<int>(blockDim.x)) {
      *reinterpret_cast<uint4*>(tiles[stage] + at) = make_uint4(0, 0, 0, 0);
    }
  }
}

template <class C>
__global__ void __launch_bounds__(C::threads, 1)
    forward_kernel(const __grid_constant__ ForwardArguments a) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  auto& smem = *reinterpret_cast<ForwardSmem<C>*>(shared_memory);
  if (threadIdx.x == 0) {
    initialize_barriers<C>(smem);
    ptx::prefetch_tensor_map(&a.query);
    ptx::prefetch_tensor_map(&a.key);
    ptx::prefetch_tensor_map(&a.value);
    ptx::prefetch_tensor_map(&a.out);
  }
  using Smem = ForwardSmem<C>;
  if (a.query_slabs < Smem::Query::slabs || a.value_slabs < Smem::Value::slabs) {
    clear_unused_slabs<typename Smem::Query>(smem.query, a.query_slabs);
    clear_unused_slabs<typename Smem::Key>(smem.key, a.query_slabs);
    clear_unused_slabs<typename Smem::Value>(smem.value, a.value_slabs);
    ptx::fence_proxy_async_shared();
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 128), 0);
  if (warpgroup == 0) {
    ptx::registers_decrease<C::producer_registers>();
    if constexpr (C::paged) {
      if (threadIdx.x / 32 == 0) load_paged_keys<C>(a, smem);
      if (threadIdx.x / 32 == 2) load_paged_values<C>(a, smem);
    } else {
      if (threadIdx.x == 0) load_tiles<C>(a, smem);
    }
    if (threadIdx.x / 32 == 1) schedule_tiles<C>(a, smem);
  } else {
    ptx::registers_increase<C::consumer_registers>();
    Consumer<C>{a, smem, warpgroup - 1, {}, {}, {}}.run();
  }
}

}  // namespace sinkattn::hopper
