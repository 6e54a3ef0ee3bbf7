// SPDX-License-Identifier: Apache-2.0
#include "hopper/kernels/schedule.h"

#include <algorithm>

#include "common/sequence.h"
#include "hopper/decode_tuning.h"
#include "hopper/device.h"
#include "sinkattn/attention.h"

namespace sinkattn::hopper {
namespace {

constexpr int block_threads = 256;
constexpr int rows_per_tile = 16;
constexpr int keys_per_tile = 64;

struct ScheduleArguments {
  const std::int32_t* cache_seqlens;
  const std::int32_t* cu_seqlens_q;
  const std::int32_t* cu_seqlens_new;
  const std::int32_t* leftpad;
  Mask mask;
  std::int64_t max_q, max_k, max_new;
  int batch, heads_kv, group, splits, blocks;
  std::int32_t* words;
  int length;
};

/// Key tiles of one row tile of sequence b, and how many row tiles times KV heads there are.
__device__ void measure(const ScheduleArguments& a, int b, std::int64_t* tiles,
                        std::int64_t* units) {
  std::int64_t rows = a.max_q;
  if (a.cu_seqlens_q != nullptr) {
    rows = clamp_index(static_cast<std::int64_t>(a.cu_seqlens_q[b + 1]) - a.cu_seqlens_q[b], 0,
                       a.max_q);
  }
  std::int64_t added = a.max_new;
  if (a.cu_seqlens_new != nullptr) {
    added = clamp_index(static_cast<std::int64_t>(a.cu_seqlens_new[b + 1]) - a.cu_seqlens_new[b], 0,
                        a.max_k);
  }
  const std::int64_t used =
      clamp_index(clamp_index(a.cache_seqlens[b], 0, a.max_k) + added, 0, a.max_k);
  const std::int64_t pad = a.leftpad == nullptr ? 0 : clamp_index(a.leftpad[b], 0, used);
  const Range low = visible_keys(a.mask, 0, rows, used - pad);
  const Range high = visible_keys(a.mask, rows - 1, rows, used - pad);
  const Range keys = {low.begin, high.end};
  *tiles = keys.empty() ? 1 : (keys.size() + keys_per_tile - 1) / keys_per_tile;
  *units = (rows * a.group + rows_per_tile - 1) / rows_per_tile * a.heads_kv;
}

/// One block: key tiles per block of the decode kernel, then pieces per sequence.
__global__ void __launch_bounds__(block_threads) schedule_kernel(const ScheduleArguments a) {
  __shared__ unsigned long long total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  std::int64_t tiles = 1;
  std::int64_t units = 0;
  for (int b = threadIdx.x; b < a.batch; b += block_threads) {
    measure(a, b, &tiles, &units);
    atomicAdd(&total, static_cast<unsigned long long>(tiles * units));
  }
  __syncthreads();
  std::int64_t part = (static_cast<std::int64_t>(total) + a.blocks - 1) / a.blocks;
  if (part < decode_min_tiles) part = decode_min_tiles;
  for (int b = threadIdx.x; b < a.batch; b += block_threads) {
    measure(a, b, &tiles, &units);
    const std::int64_t pieces = clamp_index((tiles + part - 1) / part, 1, decode_max_pieces);
    a.words[1 + b] = a.splits > 0 ? a.splits : static_cast<std::int32_t>(pieces);
  }
  for (int i = 1 + a.batch + static_cast<int>(threadIdx.x); i < a.length; i += block_threads) {
    a.words[i] = 0;
  }
  if (threadIdx.x == 0) a.words[0] = a.batch;
}

}  // namespace

Status launch_schedule(const ScheduleParams& p, int sm_count, cudaStream_t stream) {
  ScheduleArguments a = {};
  a.cache_seqlens = p.cache_seqlens.as<const std::int32_t>();
  a.cu_seqlens_q = p.cu_seqlens_q.as<const std::int32_t>();
  a.cu_seqlens_new = p.cu_seqlens_k_new.as<const std::int32_t>();
  a.leftpad = p.cache_leftpad.as<const std::int32_t>();
  a.mask = make_mask(p.mask);
  a.max_q = p.max_seqlen_q;
  a.max_k = p.max_seqlen_k;
  a.max_new = p.max_seqlen_k_new;
  a.batch = static_cast<int>(p.batch_size);
  a.heads_kv = static_cast<int>(p.num_heads_kv);
  a.group = static_cast<int>(p.num_heads_q / p.num_heads_kv);
  a.splits = p.num_splits;
  const int rounded = static_cast<int>(p.headdim);
  const DecodeTuning tuning = decode_tuning(rounded, static_cast<int>(p.headdim_v), 1);
  a.blocks = std::max(1, sm_count - p.sm_margin) * tuning.blocks;
  a.words = p.metadata.as<std::int32_t>();
  a.length = static_cast<int>(schedule_length(p.batch_size));
  schedule_kernel<<<1, block_threads, 0, stream>>>(a);
  return launch_status("schedule_kernel");
}

}  // namespace sinkattn::hopper
