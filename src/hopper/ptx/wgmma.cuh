// SPDX-License-Identifier: Apache-2.0
// Warpgroup matrix multiply, fp32 accumulators: wgmma.mma_async m64nNk16 on bf16 or fp16.
//
// Fragments (thread t of the warpgroup, w = t / 32, g = t % 32 / 4, q = t % 4): accumulator i is
// row 16 w + g + 8 (i / 2 % 2), column 8 (i / 4) + 2 q + i % 2. The four A registers of a k16 block
// hold (row g, k 2q..), (g + 8, 2q..), (g, 2q + 8..), (g + 8, 2q + 8..): a packed accumulator is an
// A operand without any shuffle.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace sinkattn::hopper::ptx {

enum class Major : int { k = 0, mn = 1 };  ///< which extent of an operand is contiguous

template <int N>
struct WgmmaShape;

#include "hopper/ptx/wgmma_shapes.inl"

/// d (+)= A B with both operands in shared memory; A is 64 x 16, B is 16 x N. accumulate 0 starts
/// from zero.
template <class T, int N, Major MajorA = Major::k, Major MajorB = Major::k, int Registers>
__device__ inline void wgmma_ss(float (&d)[Registers], std::uint64_t a, std::uint64_t b,
                                int accumulate) {
  static_assert(Registers == N / 2);
  constexpr int ta = static_cast<int>(MajorA), tb = static_cast<int>(MajorB);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    WgmmaShape<N>::template ss_bf16<ta, tb>(d, a, b, accumulate);
  } else {
    WgmmaShape<N>::template ss_f16<ta, tb>(d, a, b, accumulate);
  }
}

/// The same with A in registers.
template <class T, int N, Major MajorB = Major::k, int Registers>
__device__ inline void wgmma_rs(float (&d)[Registers], const std::uint32_t (&a)[4], std::uint64_t b,
                                int accumulate) {
  static_assert(Registers == N / 2);
  constexpr int tb = static_cast<int>(MajorB);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    WgmmaShape<N>::template rs_bf16<tb>(d, a, b, accumulate);
  } else {
    WgmmaShape<N>::template rs_f16<tb>(d, a, b, accumulate);
  }
}

/// Before the first wgmma of a batch: orders earlier register accesses of accumulators and A.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/// Until at most `Pending` committed groups of this warpgroup are unfinished.
template <int Pending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

}  // namespace sinkattn::hopper::ptx
