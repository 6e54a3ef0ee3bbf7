// SPDX-License-Identifier: Apache-2.0
// The blocked fp32 path for bf16, fp16, fp32 and e4m3 tensors: one table of functions per
// instruction set, chosen once at run time.
#pragma once

#include <cstdint>

#include "common/problem.h"

namespace sinkattn::cpu {

/// Rows of a query tile are (position, head in group), head fastest, so that a KV head's keys are
/// packed once for its whole group. 128 rows x 64 keys keeps scores, accumulator and the packed
/// keys of d = 64 within 256 KiB, a quarter of a current core's L2.
inline constexpr std::int64_t fast_tile_rows = 128;
inline constexpr std::int64_t fast_tile_keys = 64;

/// Query positions per tile for a group of heads (at least one position).
constexpr std::int64_t positions_per_tile(std::int64_t group) {
  return group >= fast_tile_rows ? 1 : fast_tile_rows / group;
}

/// Where a partial result of split-KV goes: (split, storage batch, row, head, dim) fp32, and its
/// LSE.
struct Partials {
  float* out = nullptr;
  float* lse = nullptr;  ///< (split, storage batch, row, head)
};

/// One tile of forward work: sequence, KV head, first query position, split.
struct ForwardTile {
  std::int64_t b, kv_head, position;
  int split;
};

/// One tile of backward work over queries (dq) or keys (dk, dv).
struct BackwardTile {
  std::int64_t b, kv_head, start;
};

struct FastPath {
  const char* name;
  std::int64_t (*forward_lane_bytes)(const ForwardProblem&);
  void (*forward_tile)(const ForwardProblem&, int splits, const Partials&, const ForwardTile&,
                       void* lane);
  std::int64_t (*backward_lane_bytes)(const BackwardProblem&);
  /// D' of the rows of a query tile, into d_rows (storage batch, head, row) fp32.
  void (*prepare_tile)(const BackwardProblem&, float* d_rows, const BackwardTile&, void* lane);
  void (*query_tile)(const BackwardProblem&, const float* d_rows, const BackwardTile&, void* lane);
  void (*key_tile)(const BackwardProblem&, const float* d_rows, const BackwardTile&, void* lane);
};

const FastPath& fast_path_portable();
#if defined(__x86_64__)
const FastPath& fast_path_avx2();
const FastPath& fast_path_avx512();
#endif

/// The best one for this processor.
const FastPath& fast_path();

}  // namespace sinkattn::cpu
