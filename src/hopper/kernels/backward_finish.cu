// SPDX-License-Identifier: Apache-2.0
#include "hopper/kernels/backward_finish.h"

#include <limits>

#include "hopper/core/backward_work.cuh"
#include "hopper/device.h"
#include "hopper/ptx/math.cuh"
#include "hopper/ptx/matrix.cuh"

namespace sinkattn::hopper {
namespace {

constexpr int block_threads = 128;
constexpr int tile_rows = backward_tile_queries;

/// One tile of 64 rows. The accumulator is in fragment order: vector j of thread t holds columns
/// 8 j + 2 (t % 4), + 1 of rows g and g + 8 with g = t / 32 * 16 + t % 32 / 4. At 64 columns it is
/// the fragment of the transposed tile (backward_keys_narrow.cuh).
template <class T, int Columns>
__global__ void __launch_bounds__(block_threads)
    finish_queries_kernel(const __grid_constant__ BackwardArguments p, int tiles) {
  // 16 bytes beyond a row keep the two rows of a thread in different banks.
  constexpr int row_bytes = Columns * 2 + 16;
  __shared__ alignas(16) char staged[tile_rows * row_bytes];
  const int head = blockIdx.x % p.heads_q;
  const int tile = blockIdx.x / p.heads_q % tiles;
  const int b = blockIdx.x / p.heads_q / tiles;
  const SequencePair sequence(p, b);
  const int first = tile * tile_rows;
  const std::int64_t left = sequence.queries.length - first;
  if (left <= 0) return;
  const int thread = threadIdx.x;
  const auto* from = reinterpret_cast<const float4*>(
      p.dq_accumulator + (sequence.statistics(p, head) + first) * Columns);
  const int row = thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
  for (int j = 0; j < Columns / 8; ++j) {
    const float4 x = __ldcs(from + j * block_threads + thread);
    std::uint32_t low = ptx::pack<T>(x.x * p.softmax_scale, x.y * p.softmax_scale);
    std::uint32_t high = ptx::pack<T>(x.z * p.softmax_scale, x.w * p.softmax_scale);
    if constexpr (Columns == 64) {
      low = ptx::transpose_matrix(low);
      high = ptx::transpose_matrix(high);
      char* to = staged + (8 * j + thread % 32 / 4) * row_bytes + thread / 32 * 32 + thread % 4 * 4;
      *reinterpret_cast<std::uint32_t*>(to) = low;
      *reinterpret_cast<std::uint32_t*>(to + 16) = high;
    } else {
      char* to = staged + row * row_bytes + 16 * j + 4 * (thread % 4);
      *reinterpret_cast<std::uint32_t*>(to) = low;
      *reinterpret_cast<std::uint32_t*>(to + 8 * row_bytes) = high;
    }
  }
  __syncthreads();
  const int vectors = p.head_dim / 8;
  const std::int64_t batch = p.packed_q ? 0 : b;
  T* dq = static_cast<T*>(p.dq.data) + p.dq.offset(batch, sequence.queries.first_row + first, head);
  for (int i = thread; i < tile_rows * (Columns / 8); i += block_threads) {
    const int r = i / (Columns / 8);
    const int c = i % (Columns / 8);
    if (r >= left || c >= vectors) continue;
    *reinterpret_cast<uint4*>(dq + r * p.dq.stride_row + 8 * c) =
        *reinterpret_cast<const uint4*>(staged + r * row_bytes + 16 * c);
  }
}

/// Sums of four columns of one gradient row over the splits, in order.
template <class T>
__device__ void finish_row(const BackwardArguments& p, const float* partial, int columns,
                           std::int64_t index, float scale, int column, T* to) {
  float4 sum = make_float4(0, 0, 0, 0);
  for (int split = 0; split < p.splits; ++split) {
    const float4 x = *reinterpret_cast<const float4*>(
        partial + (split * p.partial_stride + index) * columns + column);
    sum.x += x.x;
    sum.y += x.y;
    sum.z += x.z;
    sum.w += x.w;
  }
  *reinterpret_cast<uint2*>(to + column) = make_uint2(ptx::pack<T>(sum.x * scale, sum.y * scale),
                                                      ptx::pack<T>(sum.z * scale, sum.w * scale));
}

/// One block: 64 keys of one (sequence, KV head).
template <class T>
__global__ void __launch_bounds__(block_threads)
    finish_keys_kernel(const __grid_constant__ BackwardArguments p, int d, int dv, int tiles) {
  const int head = blockIdx.x % p.heads_kv;
  const int tile = blockIdx.x / p.heads_kv % tiles;
  const int b = blockIdx.x / p.heads_kv / tiles;
  const SequenceInfo keys = resolve_sequence(p.side_k, b);
  const std::int64_t batch = p.packed_k ? 0 : b;
  const int vectors = (p.head_dim + p.head_dim_v) / 4;
  for (int i = threadIdx.x; i < tile_rows * vectors; i += block_threads) {
    const std::int64_t key = tile * tile_rows + i / vectors;
    if (key >= keys.length) return;
    const std::int64_t row = keys.first_row + key;
    const std::int64_t index = (batch * p.rows_k + row) * p.heads_kv + head;
    const int column = i % vectors * 4;
    if (column < p.head_dim) {
      finish_row(p, p.dk_partial, d, index, p.softmax_scale, column,
                 static_cast<T*>(p.dk.data) + p.dk.offset(batch, row, head));
    } else {
      finish_row(p, p.dv_partial, dv, index, 1.0f, column - p.head_dim,
                 static_cast<T*>(p.dv.data) + p.dv.offset(batch, row, head));
    }
  }
}

/// Rows [begin, end) of a batch entry, all heads; elements are 16 bit.
__device__ void zero_rows(const HeadsTensor& gradient, std::int64_t batch, std::int64_t begin,
                          std::int64_t end, int heads, int vectors, int part, int parts) {
  const std::int64_t per_row = static_cast<std::int64_t>(heads) * vectors;
  const std::int64_t n = (end - begin) * per_row;
  auto* to = static_cast<std::uint16_t*>(gradient.data);
  for (std::int64_t i = part * block_threads + threadIdx.x; i < n; i += parts * block_threads) {
    const std::int64_t row = begin + i / per_row;
    const int head = static_cast<int>(i % per_row) / vectors;
    const int column = static_cast<int>(i % per_row) % vectors * 8;
    *reinterpret_cast<uint4*>(to + gradient.offset(batch, row, head) + column) =
        make_uint4(0, 0, 0, 0);
  }
}

/// `parts` blocks per sequence zero its rows past the used ones; in packed tensors `parts` more
/// zero what lies before the first and behind the last sequence. all: the used rows as well.
__global__ void __launch_bounds__(block_threads)
    zero_unused_kernel(HeadsTensor gradient, SequenceSide side, bool packed, int batch, int heads,
                       int vectors, int parts, bool all) {
  const int b = blockIdx.x / parts;
  const int part = blockIdx.x % parts;
  if (b < batch) {
    const SequenceInfo info = resolve_sequence(side, b);
    zero_rows(gradient, packed ? 0 : b, info.first_row + (all ? 0 : info.length),
              info.first_row + info.extent, heads, vectors, part, parts);
    return;
  }
  const std::int64_t first = batch > 0 ? clamp_index(side.cu_seqlens[0], 0, side.capacity) : 0;
  const std::int64_t last = clamp_index(side.cu_seqlens[batch], first, side.capacity);
  zero_rows(gradient, 0, 0, first, heads, vectors, part, parts);
  zero_rows(gradient, 0, last, side.capacity, heads, vectors, part, parts);
}

template <class T>
void finish_queries(const BackwardArguments& p, int columns, int tiles, unsigned grid,
                    cudaStream_t stream) {
  switch (columns) {
    case 64:
      return finish_queries_kernel<T, 64><<<grid, block_threads, 0, stream>>>(p, tiles);
    case 96:
      return finish_queries_kernel<T, 96><<<grid, block_threads, 0, stream>>>(p, tiles);
    case 128:
      return finish_queries_kernel<T, 128><<<grid, block_threads, 0, stream>>>(p, tiles);
    case 192:
      return finish_queries_kernel<T, 192><<<grid, block_threads, 0, stream>>>(p, tiles);
    default:
      return finish_queries_kernel<T, 256><<<grid, block_threads, 0, stream>>>(p, tiles);
  }
}

}  // namespace

Status launch_finish_queries(const BackwardArguments& p, DType dtype, int columns,
                             std::int64_t tiles, cudaStream_t stream) {
  const auto grid = static_cast<unsigned>(p.batch * tiles * p.heads_q);
  if (grid == 0) return {};
  if (dtype == DType::bfloat16) {
    finish_queries<__nv_bfloat16>(p, columns, static_cast<int>(tiles), grid, stream);
  } else {
    finish_queries<__half>(p, columns, static_cast<int>(tiles), grid, stream);
  }
  return launch_status("finish_queries_kernel");
}

Status launch_finish_keys(const BackwardArguments& p, DType dtype, CompiledDims dims,
                          std::int64_t longest_k, cudaStream_t stream) {
  const int tiles = static_cast<int>((longest_k + tile_rows - 1) / tile_rows);
  const auto grid = static_cast<unsigned>(p.batch * tiles * p.heads_kv);
  if (grid == 0) return {};
  if (dtype == DType::bfloat16) {
    finish_keys_kernel<__nv_bfloat16>
        <<<grid, block_threads, 0, stream>>>(p, dims.d, dims.dv, tiles);
  } else {
    finish_keys_kernel<__half><<<grid, block_threads, 0, stream>>>(p, dims.d, dims.dv, tiles);
  }
  return launch_status("finish_keys_kernel");
}

Status launch_zero_unused(const HeadsTensor& gradient, const SequenceSide& side, bool packed,
                          int batch, int heads, int head_dim, bool all, cudaStream_t stream) {
  constexpr int parts = 16;
  const bool whole = !packed && side.seqused == nullptr && !all;
  if (gradient.data == nullptr || whole) return {};
  const auto grid = static_cast<unsigned>((batch + (packed ? 1 : 0)) * parts);
  if (grid == 0) return {};
  zero_unused_kernel<<<grid, block_threads, 0, stream>>>(gradient, side, packed, batch, heads,
                                                         head_dim / 8, parts, all);
  return launch_status("zero_unused_kernel");
}

}  // namespace sinkattn::hopper
