// SPDX-License-Identifier: Apache-2.0
#include "hopper/launch.h"

#include <mutex>
#include <set>
#include <utility>

#include "hopper/device.h"

namespace sinkattn::hopper {
namespace {

/// Sets the attribute once per kernel and device; the last success is remembered per thread, so
/// that a running program takes no lock.
Status allow_shared_memory(const void* kernel, const char* name, int bytes) {
  constexpr int default_limit = 48 * 1024;
  if (bytes <= default_limit) return {};
  int device = 0;
  SINKATTN_RETURN_IF_ERROR(cuda_status(cudaGetDevice(&device), "device"));
  using Key = std::pair<const void*, int>;
  static thread_local std::set<Key> known;
  const Key key{kernel, device};
  if (known.count(key) != 0) return {};
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  SINKATTN_RETURN_IF_ERROR(cuda_status(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name));
  known.insert(key);
  return {};
}

}  // namespace

Status launch_kernel(const void* kernel, const char* name, const LaunchShape& shape, void* argument,
                     cudaStream_t stream) {
  SINKATTN_RETURN_IF_ERROR(allow_shared_memory(kernel, name, shape.shared_bytes));
  void* arguments[] = {argument};
  return cuda_status(cudaLaunchKernel(kernel, dim3(shape.grid), dim3(shape.block), arguments,
                                      static_cast<std::size_t>(shape.shared_bytes), stream),
                     name);
}

}  // namespace sinkattn::hopper
