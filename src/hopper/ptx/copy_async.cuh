// SPDX-License-Identifier: Apache-2.0
// cp.async: 16-byte copies, global -> shared memory, issued by every thread for itself. Unlike the
// copy engine they take any address per 16 bytes: pages of any size, and rows that fill with zeros.
#pragma once

#include <cstdint>

namespace sinkattn::hopper::ptx {

/// 16 bytes from `source`, or zeros (then `source` is not read). Both addresses 16-byte aligned.
__device__ inline void copy_async_16(std::uint32_t destination, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(destination),
               "l"(source), "r"(valid ? 16 : 0)
               : "memory");
}

/// The same for what is read once: it is the first to leave L2 again.
__device__ inline void copy_async_16_once(std::uint32_t destination, const void* source, bool valid,
                                          std::uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(
                   destination),
               "l"(source), "r"(valid ? 16 : 0), "l"(policy)
               : "memory");
}

/// Cache policy of such copies.
__device__ inline std::uint64_t evict_first_policy() {
  std::uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Until all but the newest `Pending` groups of this thread have landed. Other threads' copies
/// become visible by a barrier after they waited as well.
template <int Pending>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

}  // namespace sinkattn::hopper::ptx
