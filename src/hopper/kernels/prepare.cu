// SPDX-License-Identifier: Apache-2.0
#include "hopper/kernels/prepare.h"

#include <cmath>
#include <limits>

#include "hopper/backward_tuning.h"
#include "hopper/device.h"
#include "hopper/kernels/element.cuh"

namespace sinkattn::hopper {
namespace {

constexpr int block_threads = 128;
constexpr int vector_elements = 8;  // one 16-byte load of a 16-bit type
constexpr float log2e = 1.4426950408889634f;

struct PrepareParams {
  HeadsTensor out, dout;
  RowsTensor lse, dlse, softmax_d;
  VectorView sink;
  SequenceSide side_q;
  float* lse2;
  float* d;
  float* partials;
  PrepareAccumulator accumulator;
  std::int64_t rows, tiles, blocks;
  int heads, head_dim_v;
  bool packed;
};

template <class T>
__device__ float2 to_float2(T pair);
template <>
__device__ float2 to_float2(__nv_bfloat162 pair) {
  return __bfloat1622float2(pair);
}
template <>
__device__ float2 to_float2(__half2 pair) {
  return __half22float2(pair);
}

/// Dot product of 8 elements of each operand.
template <class Pair>
__device__ float dot8(const uint4& a, const uint4& b) {
  const Pair* x = reinterpret_cast<const Pair*>(&a);
  const Pair* y = reinterpret_cast<const Pair*>(&b);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 u = to_float2(x[i]);
    const float2 v = to_float2(y[i]);
    sum = fmaf(u.x, v.x, fmaf(u.y, v.y, sum));
  }
  return sum;
}

/// rowsum(dout * out) of one row by a group of Threads lanes; the sum is in every lane.
template <class Pair, int Threads>
__device__ float row_dot(const PrepareParams& p, std::int64_t batch, std::int64_t row, int head,
                         int lane) {
  if (p.dout.data == nullptr) return 0.0f;
  const auto* out = static_cast<const char*>(p.out.data) + 2 * p.out.offset(batch, row, head);
  const auto* dout = static_cast<const char*>(p.dout.data) + 2 * p.dout.offset(batch, row, head);
  float sum = 0.0f;
  for (int c = lane * vector_elements; c < p.head_dim_v; c += Threads * vector_elements) {
    sum += dot8<Pair>(__ldcs(reinterpret_cast<const uint4*>(out + 2 * c)),
                      __ldcs(reinterpret_cast<const uint4*>(dout + 2 * c)));
  }
#pragma unroll
  for (int step = Threads / 2; step > 0; step /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, step, Threads);
  }
  return sum;
}

/// Sum over the block in a fixed order; the result is in thread 0.
__device__ float block_sum(float value) {
  __shared__ float warp_sums[block_threads / 32];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_down_sync(0xffffffffu, value, step);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < block_threads / 32; ++warp) sum += warp_sums[warp];
  return sum;
}

/// Zeros the accumulator's rows [row, row + 128).
__device__ void zero_accumulator(const PrepareAccumulator& accumulator, std::int64_t row) {
  if (accumulator.data == nullptr) return;
  auto* to = reinterpret_cast<float4*>(accumulator.data + row * accumulator.columns);
  constexpr int tiles = static_cast<int>(prepare_tile_rows) / backward_tile_queries;
  if (accumulator.turns != nullptr && threadIdx.x < tiles) {
    accumulator.turns[row / backward_tile_queries + threadIdx.x] = 0;
  }
  const int vectors = static_cast<int>(prepare_tile_rows) * accumulator.columns / 4;
  for (int i = threadIdx.x; i < vectors; i += block_threads) to[i] = make_float4(0, 0, 0, 0);
}

/// One block: 128 rows of one (sequence, head). Heads vary fastest over blocks, because the heads
/// of a row are neighbours in memory. Threads: lanes that share a row.
template <class Pair, int Threads>
__global__ void __launch_bounds__(block_threads) prepare_kernel(const PrepareParams p) {
  const int head = static_cast<int>(blockIdx.x % p.heads);
  const std::int64_t block = blockIdx.x / p.heads;
  const std::int64_t tile = block % p.tiles;
  const std::int64_t b = block / p.tiles;
  const SequenceInfo sequence = resolve_sequence(p.side_q, b);
  const std::int64_t batch = p.packed ? 0 : b;
  const std::int64_t padded = p.packed ? PrepareLayout::padded_row(sequence.first_row, b) : 0;
  const std::int64_t statistics = (batch * p.heads + head) * p.rows + padded;
  const int lane = threadIdx.x % Threads;
  const float sink = load_sink(p.sink, head);
  // A sink of -inf has no weight in any row; one of +inf makes every row constant.
  const bool has_gradient = !isinf(sink);
  const std::int64_t first = tile * prepare_tile_rows;
  // A packed sequence owns its padded rows only up to the last tile it reaches into.
  if (first >= sequence.length && p.packed) {
    if (threadIdx.x == 0 && p.partials != nullptr) p.partials[head * p.blocks + block] = 0.0f;
    return;
  }
  zero_accumulator(p.accumulator, statistics + first);
  float partial = 0.0f;
#pragma unroll 4
  for (int r = threadIdx.x / Threads; r < prepare_tile_rows; r += block_threads / Threads) {
    const std::int64_t i = first + r;
    const bool used = i < sequence.length;
    const std::int64_t row = sequence.first_row + i;
    float d = 0.0f;
    float lse2 = INFINITY;
    // Uniform in the group of lanes that share the row, not in the warp: rows past the end run the
    // shuffles of row_dot on row 0 of the tile, which exists.
    const float dot = row_dot<Pair, Threads>(p, batch, used ? row : sequence.first_row, head, lane);
    if (used) {
      const float lse = static_cast<const float*>(p.lse.data)[p.lse.offset(batch, head, row)];
      d = dot;
      if (p.dlse.data != nullptr) {
        d -= static_cast<const float*>(p.dlse.data)[p.dlse.offset(batch, head, row)];
      }
      lse2 = lse == -INFINITY ? 0.0f : lse * log2e;
      if (has_gradient && lane == 0 && lse != -INFINITY) {
        // Subtracted in natural units: a sink near the end of fp32 overflows in log2 units.
        partial -= exp2f((sink - lse) * log2e) * d;
      }
    }
    if (lane != 0) continue;
    p.lse2[statistics + i] = lse2;
    p.d[statistics + i] = d;
    if (p.softmax_d.data != nullptr && row < p.side_q.capacity && (used || !p.packed)) {
      static_cast<float*>(p.softmax_d.data)[p.softmax_d.offset(batch, head, row)] = d;
    }
  }
  if (p.partials == nullptr) return;
  const float sum = block_sum(partial);
  if (threadIdx.x == 0) p.partials[head * p.blocks + block] = sum;
}

/// dsink of one head: its partial sums in index order per thread, then over threads in order.
__global__ void __launch_bounds__(block_threads)
    reduce_sink_kernel(const float* partials, std::int64_t blocks, VectorView dsink) {
  __shared__ double sums[block_threads];
  const float* mine = partials + blockIdx.x * blocks;
  double sum = 0.0;
  for (std::int64_t i = threadIdx.x; i < blocks; i += block_threads) sum += mine[i];
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double total = 0.0;
  for (int t = 0; t < block_threads; ++t) total += sums[t];
  store_element(dsink.data, dsink.dtype, blockIdx.x * dsink.stride[0], static_cast<float>(total));
}

/// Zeros D' rows that belong to no packed sequence (all of them: the used ones follow).
__global__ void __launch_bounds__(block_threads)
    zero_statistics_kernel(RowsTensor statistics, std::int64_t heads, std::int64_t rows) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * block_threads + threadIdx.x;
  if (i >= heads * rows) return;
  static_cast<float*>(statistics.data)[statistics.offset(0, i / rows, i % rows)] = 0.0f;
}

std::size_t aligned(std::int64_t bytes) {
  return static_cast<std::size_t>((bytes + 255) / 256 * 256);
}

template <class Pair>
void launch_main(const PrepareParams& p, unsigned grid, cudaStream_t stream) {
  if (p.head_dim_v <= 64) {
    prepare_kernel<Pair, 8><<<grid, block_threads, 0, stream>>>(p);
  } else if (p.head_dim_v <= 128) {
    prepare_kernel<Pair, 16><<<grid, block_threads, 0, stream>>>(p);
  } else {
    prepare_kernel<Pair, 32><<<grid, block_threads, 0, stream>>>(p);
  }
}

}  // namespace

PrepareLayout::PrepareLayout(const BackwardProblem& problem) {
  const auto round_up = [](std::int64_t n) {
    return (n + prepare_tile_rows - 1) / prepare_tile_rows * prepare_tile_rows;
  };
  const std::int64_t batch = problem.packed_q ? 1 : problem.batch;
  rows = problem.packed_q ? round_up(problem.rows_q + problem.batch * prepare_tile_rows)
                          : round_up(problem.rows_q);
  tiles = round_up(problem.packed_q ? problem.longest_q : problem.rows_q) / prepare_tile_rows;
  blocks = problem.batch * tiles;
  const std::int64_t bytes_of_rows = 4 * batch * problem.heads_q * rows;
  lse2_offset = 0;
  d_offset = aligned(bytes_of_rows);
  partial_offset = d_offset + aligned(bytes_of_rows);
  bytes = partial_offset + aligned(4 * problem.heads_q * blocks);
}

Status launch_prepare(const BackwardProblem& problem, void* workspace,
                      const PrepareAccumulator& accumulator, cudaStream_t stream) {
  const PrepareLayout layout(problem);
  char* memory = static_cast<char*>(workspace);
  PrepareParams p;
  p.out = problem.out;
  p.dout = problem.dout;
  p.lse = problem.lse;
  p.dlse = problem.dlse;
  p.softmax_d = problem.softmax_d;
  p.sink = problem.sink;
  p.side_q = problem.side_q;
  p.lse2 = reinterpret_cast<float*>(memory + layout.lse2_offset);
  p.d = reinterpret_cast<float*>(memory + layout.d_offset);
  float* partials = reinterpret_cast<float*>(memory + layout.partial_offset);
  p.partials = problem.dsink.data == nullptr ? nullptr : partials;
  p.accumulator = accumulator;
  p.rows = layout.rows;
  p.tiles = layout.tiles;
  p.blocks = layout.blocks;
  p.heads = static_cast<int>(problem.heads_q);
  p.head_dim_v = static_cast<int>(problem.head_dim_v);
  p.packed = problem.packed_q;
  if (problem.packed_q && problem.softmax_d.data != nullptr && problem.rows_q > 0) {
    const std::int64_t n = problem.heads_q * problem.rows_q;
    zero_statistics_kernel<<<static_cast<unsigned>((n + block_threads - 1) / block_threads),
                             block_threads, 0, stream>>>(problem.softmax_d, problem.heads_q,
                                                         problem.rows_q);
    SINKATTN_RETURN_IF_ERROR(launch_status("zero_statistics_kernel"));
  }
  const std::int64_t grid = layout.blocks * problem.heads_q;
  if (grid > std::numeric_limits<std::int32_t>::max()) {
    return Status::error(StatusCode::not_implemented,
                         "q: expected fewer than 2^31 tiles of 128 rows, got more");
  }
  if (grid > 0) {
    if (problem.out.dtype == DType::bfloat16) {
      launch_main<__nv_bfloat162>(p, static_cast<unsigned>(grid), stream);
    } else {
      launch_main<__half2>(p, static_cast<unsigned>(grid), stream);
    }
    SINKATTN_RETURN_IF_ERROR(launch_status("prepare_kernel"));
  }
  if (problem.dsink.data == nullptr) return {};
  reduce_sink_kernel<<<static_cast<unsigned>(problem.heads_q), block_threads, 0, stream>>>(
      partials, layout.blocks, problem.dsink);
  return launch_status("reduce_sink_kernel");
}

}  // namespace sinkattn::hopper
