// SPDX-License-Identifier: Apache-2.0
// Launches of the two passes for one pair of head dims.
#pragma once

#include "hopper/device.h"
#include "hopper/kernels/backward_keys_kernel.cuh"
#include "hopper/kernels/backward_launch.h"
#include "hopper/kernels/backward_queries.cuh"

namespace sinkattn::hopper {

template <class Kernel>
Status launch_pass(Kernel kernel, int threads, int shared_bytes, const char* name,
                   const BackwardArguments& p, unsigned grid, cudaStream_t stream) {
  SINKATTN_RETURN_IF_ERROR(cuda_status(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
      name));
  kernel<<<grid, threads, shared_bytes, stream>>>(p);
  return launch_status(name);
}

template <class C>
Status launch_keys(const BackwardArguments& p, unsigned grid, cudaStream_t stream) {
  return launch_pass(backward_keys_kernel<C>, C::threads, KeyPassSmem<C>::allocated,
                     "backward_keys_kernel", p, grid, stream);
}

template <class C>
Status launch_queries(const BackwardArguments& p, unsigned grid, cudaStream_t stream) {
  return launch_pass(backward_queries_kernel<C>, C::threads, QueryPassSmem<C>::allocated,
                     "backward_queries_kernel", p, grid, stream);
}

/// The key pass: Pass is KeyPass or WideKeyPass of one pair of head dims.
template <template <class, bool> class Pass>
Status launch_key_pass(const BackwardArguments& p, DType dtype, unsigned grid,
                       cudaStream_t stream) {
  const bool softcap = p.score_cap != 0.0f;
  if (dtype == DType::bfloat16) {
    return softcap ? launch_keys<Pass<__nv_bfloat16, true>>(p, grid, stream)
                   : launch_keys<Pass<__nv_bfloat16, false>>(p, grid, stream);
  }
  return softcap ? launch_keys<Pass<__half, true>>(p, grid, stream)
                 : launch_keys<Pass<__half, false>>(p, grid, stream);
}

template <int D, int DV>
Status launch_query_pass(const BackwardArguments& p, DType dtype, unsigned grid,
                         cudaStream_t stream) {
  const bool softcap = p.score_cap != 0.0f;
  if (dtype == DType::bfloat16) {
    return softcap ? launch_queries<QueryPass<__nv_bfloat16, D, DV, true>>(p, grid, stream)
                   : launch_queries<QueryPass<__nv_bfloat16, D, DV, false>>(p, grid, stream);
  }
  return softcap ? launch_queries<QueryPass<__half, D, DV, true>>(p, grid, stream)
                 : launch_queries<QueryPass<__half, D, DV, false>>(p, grid, stream);
}

}  // namespace sinkattn::hopper

/// Defines the BackwardInstance of a pair of head dims; `Pass_` is KeyPass, NarrowKeyPass,
/// JointKeyPass or WideKeyPass.
#define SINKATTN_BACKWARD_INSTANCE(Pass_, D, DV)                                      \
  namespace sinkattn::hopper {                                                        \
  namespace {                                                                         \
  template <class T, bool Softcap>                                                    \
  using Keys = Pass_<T, D, DV, Softcap>;                                              \
  }                                                                                   \
  const BackwardInstance backward_##D##_##DV = {{D, DV},                              \
                                                Keys<__half, false>::keys,            \
                                                Keys<__half, false>::splits_for_l2,   \
                                                Keys<__half, false>::third_adds_keys, \
                                                QueryPassTuning<D, DV>::keys,         \
                                                launch_key_pass<Keys>,                \
                                                launch_query_pass<D, DV>};            \
  }
