// SPDX-License-Identifier: Apache-2.0
#include "hopper/device.h"

#include <atomic>
#include <mutex>

#include "common/backend.h"

namespace sinkattn::hopper {

Status cuda_status(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  return Status::error(StatusCode::runtime_error, "%s: expected success, got CUDA error %d, %s",
                       what, static_cast<int>(error), cudaGetErrorString(error));
}

Status launch_status(const char* kernel) { return cuda_status(cudaGetLastError(), kernel); }

namespace {

Status read_properties(int index, DeviceProperties* properties) {
  int count = 0;
  SINKATTN_RETURN_IF_ERROR(cuda_status(cudaGetDeviceCount(&count), "device"));
  if (index < 0 || index >= count) {
    return Status::error(StatusCode::value_error,
                         "device: expected a CUDA ordinal in [0, %d), got %d", count, index);
  }
  const auto attribute = [&](cudaDeviceAttr which, int* value) {
    return cuda_status(cudaDeviceGetAttribute(value, which, index), "device");
  };
  int major = 0;
  int minor = 0;
  int l2 = 0;
  SINKATTN_RETURN_IF_ERROR(attribute(cudaDevAttrMultiProcessorCount, &properties->sm_count));
  SINKATTN_RETURN_IF_ERROR(attribute(cudaDevAttrComputeCapabilityMajor, &major));
  SINKATTN_RETURN_IF_ERROR(attribute(cudaDevAttrComputeCapabilityMinor, &minor));
  SINKATTN_RETURN_IF_ERROR(attribute(cudaDevAttrL2CacheSize, &l2));
  properties->device = {DeviceType::cuda, index};
  properties->compute_capability = 10 * major + minor;
  properties->l2_bytes = l2;
  return {};
}

}  // namespace

Status query_device(int index, DeviceProperties* properties) {
  // Every call asks, so a device that was read once is found without a lock: `ready` is set after
  // the entry is complete and never cleared.
  struct Entry {
    std::atomic<bool> ready{false};
    DeviceProperties properties;
  };
  constexpr int cached_devices = 64;
  static Entry known[cached_devices];
  if (index < 0 || index >= cached_devices) return read_properties(index, properties);
  Entry& entry = known[index];
  if (!entry.ready.load(std::memory_order_acquire)) {
    static std::mutex mutex;
    const std::lock_guard lock(mutex);
    if (!entry.ready.load(std::memory_order_relaxed)) {
      DeviceProperties read;
      SINKATTN_RETURN_IF_ERROR(read_properties(index, &read));
      entry.properties = read;
      entry.ready.store(true, std::memory_order_release);
    }
  }
  *properties = entry.properties;
  return {};
}

}  // namespace sinkattn::hopper
