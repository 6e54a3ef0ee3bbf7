// SPDX-License-Identifier: Apache-2.0
// Launch of the key pass for one pair of head dims.
#pragma once

#include "hopper/device.h"
#include "hopper/kernels/backward_keys_main.cuh"
#include "hopper/kernels/backward_launch.h"

namespace sinkattn::hopper {

template <class C>
Status launch_key_pass(const BackwardArguments& p, unsigned grid, cudaStream_t stream) {
  constexpr int bytes = KeyPassSmem<C>::allocated;
  SINKATTN_RETURN_IF_ERROR(cuda_status(
      cudaFuncSetAttribute(backward_keys_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           bytes),
      "backward_keys_kernel"));
  backward_keys_kernel<C><<<grid, C::threads, bytes, stream>>>(p);
  return launch_status("backward_keys_kernel");
}

template <int D, int DV>
Status launch_key_pass(const BackwardArguments& p, DType dtype, unsigned grid,
                       cudaStream_t stream) {
  const bool softcap = p.score_cap != 0.0f;
  if (dtype == DType::bfloat16) {
    return softcap ? launch_key_pass<KeyPass<__nv_bfloat16, D, DV, true>>(p, grid, stream)
                   : launch_key_pass<KeyPass<__nv_bfloat16, D, DV, false>>(p, grid, stream);
  }
  return softcap ? launch_key_pass<KeyPass<__half, D, DV, true>>(p, grid, stream)
                 : launch_key_pass<KeyPass<__half, D, DV, false>>(p, grid, stream);
}

}  // namespace sinkattn::hopper
