// SPDX-License-Identifier: Apache-2.0
#include "hopper/launch.h"

#include <cstddef>
#include <cstdint>
#include <mutex>

#include "hopper/device.h"

namespace sinkattn::hopper {
namespace {

/// Kernels whose limit this thread has raised, by device. Direct mapped: a collision raises the
/// limit again, which is slow but right.
struct Raised {
  const void* kernel = nullptr;
  int device = -1;
};

constexpr std::size_t raised_slots = 64;

std::size_t slot_of(const void* kernel, int device) {
  const auto mixed = (reinterpret_cast<std::uintptr_t>(kernel) + static_cast<unsigned>(device)) *
                     std::uint64_t{0x9E3779B97F4A7C15};
  return static_cast<std::size_t>(mixed >> 58);
}

/// Sets the attribute once per kernel and device; the last success is remembered per thread, so
/// that a running program takes no lock.
Status allow_shared_memory(const void* kernel, const char* name, int bytes) {
  constexpr int default_limit = 48 * 1024;
  if (bytes <= default_limit) return {};
  int device = 0;
  SINKATTN_RETURN_IF_ERROR(cuda_status(cudaGetDevice(&device), "device"));
  static thread_local Raised raised[raised_slots];
  Raised& entry = raised[slot_of(kernel, device)];
  if (entry.kernel == kernel && entry.device == device) return {};
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  SINKATTN_RETURN_IF_ERROR(cuda_status(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name));
  entry = {kernel, device};
  return {};
}

}  // namespace

Status launch_kernel(const void* kernel, const char* name, const LaunchShape& shape, void* argument,
                     cudaStream_t stream) {
  SINKATTN_RETURN_IF_ERROR(allow_shared_memory(kernel, name, shape.shared_bytes));
  void* arguments[] = {argument};
  // Not cudaLaunchKernel, which takes 0.2 us longer to come to the same.
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(shape.grid);
  config.blockDim = dim3(shape.block);
  config.dynamicSmemBytes = static_cast<std::size_t>(shape.shared_bytes);
  config.stream = stream;
  return cuda_status(cudaLaunchKernelExC(&config, kernel, arguments), name);
}

}  // namespace sinkattn::hopper
