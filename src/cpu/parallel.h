// SPDX-License-Identifier: Apache-2.0
// Work sharing of the CPU backend. Items are dealt to a fixed number of lanes (lane, lane + lanes,
// ..), so that growing causal rows balance, and each lane owns one slot of the workspace. Results
// never depend on the number of lanes: an item writes its own outputs alone.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

#include "sinkattn/attention.h"

namespace sinkattn::cpu {

/// Lanes for `items` pieces of work on this machine. The core count is read once: it follows the
/// process's affinity, and a run must not find more lanes than its plan made workspace for.
inline int lanes_for(std::int64_t items) {
  static const unsigned cores = std::max(1u, std::thread::hardware_concurrency());
  return static_cast<int>(std::clamp<std::int64_t>(items, 1, cores));
}

/// Runs function(lane) for every lane on own threads. Where the system refuses a thread (or memory
/// for one), the caller does the remaining lanes itself: nothing may throw out of the library.
template <class Function>
void run_on_threads(int lanes, const Function& function) {
  std::vector<std::jthread> threads;
  int next = 1;
  try {
    threads.reserve(static_cast<std::size_t>(lanes - 1));
    for (; next < lanes; ++next) threads.emplace_back([&function, next] { function(next); });
  } catch (const std::exception&) {
  }
  function(0);
  for (; next < lanes; ++next) function(next);
}

/// Runs function(lane, item) for every item in [0, items).
template <class Function>
void for_each_item(const ExecutionContext& context, std::int64_t items, int lanes,
                   const Function& function) {
  struct Body {
    const Function& function;
    std::int64_t items;
    int lanes;
    void run(std::int64_t lane) const {
      for (std::int64_t item = lane; item < items; item += lanes) {
        function(static_cast<int>(lane), item);
      }
    }
  };
  Body body{function, items, lanes};
  if (items <= 0) return;
  if (context.parallel_for != nullptr) {
    context.parallel_for(
        context.executor_context, lanes,
        [](void* self, std::int64_t begin, std::int64_t end) {
          for (std::int64_t lane = begin; lane < end; ++lane) static_cast<Body*>(self)->run(lane);
        },
        &body);
    return;
  }
  run_on_threads(lanes, [&body](std::int64_t lane) { body.run(lane); });
}

}  // namespace sinkattn::cpu
