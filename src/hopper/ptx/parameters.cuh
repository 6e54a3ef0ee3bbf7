// SPDX-License-Identifier: Apache-2.0
// Kernel parameters lie in constant memory, whose cache is cold at every launch.
#pragma once

#include <cstdint>

namespace sinkattn::hopper::ptx {

/// Reads every cache line of a kernel's parameters, all at once: used one after the other they
/// would each stall the warp for a trip to L2. `parameters` is a __grid_constant__.
template <class Parameters>
__device__ inline void fetch_parameters(const Parameters& parameters) {
  constexpr int line_words = 16;
  constexpr int lines = (int{sizeof(Parameters)} / 4 + line_words - 1) / line_words;
  const auto* words = reinterpret_cast<const std::uint32_t*>(&parameters);
  std::uint32_t all = 0;
#pragma unroll
  for (int i = 0; i < lines; ++i) all |= words[line_words * i];
  if (all == 0) __nanosleep(0);  // never; without a use the loads would be dropped
}

}  // namespace sinkattn::hopper::ptx
