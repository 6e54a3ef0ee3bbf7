// SPDX-License-Identifier: Apache-2.0
// The copy engine: cp.async.bulk.tensor between global tensors and shared memory (PTX ISA, "Data
// Movement: tensor copy"). One elected thread issues; loads complete on an mbarrier, stores and
// reductions on the issuing thread's bulk groups.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "hopper/ptx/mbarrier.cuh"

namespace sinkattn::hopper::ptx {

__device__ inline void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/// Coordinates of a box in a five-dimensional tensor map, innermost first.
struct BoxCoordinates {
  std::int32_t c0, c1, c2, c3, c4;
};

/// Global box -> shared memory at `destination`; completes on `barrier`.
__device__ inline void tma_load(std::uint32_t destination, const CUtensorMap* map,
                                std::uint64_t* barrier, BoxCoordinates at) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(destination),
      "l"(map), "r"(shared_address(barrier)), "r"(at.c0), "r"(at.c1), "r"(at.c2), "r"(at.c3),
      "r"(at.c4)
      : "memory");
}

/// Shared memory -> global box; elements outside the tensor are dropped.
__device__ inline void tma_store(const CUtensorMap* map, std::uint32_t source, BoxCoordinates at) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group"
      " [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
      "r"(source), "r"(at.c0), "r"(at.c1), "r"(at.c2), "r"(at.c3), "r"(at.c4)
      : "memory");
}

/// Contiguous bytes, global -> shared memory; both addresses and `bytes` are multiples of 16.
__device__ inline void bulk_load(std::uint32_t destination, const void* source, std::uint32_t bytes,
                                 std::uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(destination),
      "l"(source), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

/// Adds contiguous fp32 values of shared memory to global memory; order undefined.
__device__ inline void bulk_reduce_add(float* destination, std::uint32_t source,
                                       std::uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(
                   destination),
               "r"(source), "r"(bytes)
               : "memory");
}

__device__ inline void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

/// Until all but `Pending` groups of this thread have read their shared memory.
template <int Pending>
__device__ inline void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}

/// Until all but `Pending` groups of this thread are complete in memory.
template <int Pending>
__device__ inline void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(Pending) : "memory");
}

}  // namespace sinkattn::hopper::ptx
