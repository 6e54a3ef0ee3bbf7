// SPDX-License-Identifier: Apache-2.0
// How the files of this folder describe a compiled forward kernel.
#pragma once

#include <type_traits>

#include "hopper/forward_tuning.h"
#include "hopper/kernels/forward.cuh"

namespace sinkattn::hopper {

inline constexpr int max_shared_bytes = 232448;  // per block, compute capability 9.0

template <class T, int HeadDim, int HeadDimV, ForwardUse Use = ForwardUse::general,
          bool Paged = false>
ForwardInstance forward_instance(const char* name) {
  using Tiles = std::conditional_t<Paged, PagedTile<HeadDim, HeadDimV, Use>,
                                   ForwardTile<HeadDim, HeadDimV, Use>>;
  using Config = ForwardConfig<T, HeadDim, HeadDimV, Tiles::shape, Paged>;
  static_assert(sizeof(ForwardSmem<Config>) <= max_shared_bytes);
  constexpr DType dtype = std::is_same_v<T, __half> ? DType::float16 : DType::bfloat16;
  return {name,
          dtype,
          HeadDim,
          HeadDimV,
          Use,
          Paged,
          Config::tile_m,
          Config::tile_n,
          Config::threads,
          static_cast<int>(sizeof(ForwardSmem<Config>)),
          reinterpret_cast<const void*>(&forward_kernel<Config>)};
}

}  // namespace sinkattn::hopper
