// SPDX-License-Identifier: Apache-2.0
#include "hopper/launch_dependent.h"

#include <set>
#include <utility>

namespace sinkattn::hopper {

Status prepare_launch(const void* kernel, const char* name, int shared_bytes) {
  int device = 0;
  SINKATTN_RETURN_IF_ERROR(cuda_status(cudaGetDevice(&device), "device"));
  static thread_local std::set<std::pair<const void*, int>> known;
  const std::pair<const void*, int> key{kernel, device};
  if (known.count(key) != 0) return {};
  if (shared_bytes > 0) {
    SINKATTN_RETURN_IF_ERROR(cuda_status(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        name));
  }
  SINKATTN_RETURN_IF_ERROR(
      cuda_status(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                       cudaSharedmemCarveoutMaxShared),
                  name));
  known.insert(key);
  return {};
}

}  // namespace sinkattn::hopper
