// SPDX-License-Identifier: Apache-2.0
// Ordering between proxies, named barriers, election, register budgets, dependent launches.
#pragma once

#include <cstdint>

namespace sinkattn::hopper::ptx {

/// Orders this thread's ordinary shared-memory accesses before later asynchronous ones (wgmma,
/// copy engine) that are issued after a barrier. Every writing thread needs it.
__device__ inline void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/// Orders all accesses of this thread before and after between ordinary and asynchronous.
__device__ inline void fence_proxy_async() { asm volatile("fence.proxy.async;" ::: "memory"); }

/// A value that other blocks store with store_release(), and what they did before.
__device__ inline int load_acquire(const int* address) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

__device__ inline void store_release(int* address, int value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

/// Waits until `threads` threads (a multiple of 32) have come to barrier `id` (1 to 15), counting
/// those that only arrive.
__device__ inline void named_barrier_sync(int id, int threads) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ inline void named_barrier_arrive(int id, int threads) {
  asm volatile("barrier.cta.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/// True in exactly one lane of a converged warp.
__device__ inline bool elect_one() {
  std::uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
}

/// Raises or lowers the registers per thread of this warpgroup; Count a multiple of 8 in 24..256.
template <int Count>
__device__ inline void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}

template <int Count>
__device__ inline void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}

/// Memory of the grid this one was launched behind may be read only after this returns.
__device__ inline void wait_for_previous_grid() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

/// Lets the next grid of a programmatic launch start.
__device__ inline void launch_dependent_grids() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace sinkattn::hopper::ptx
