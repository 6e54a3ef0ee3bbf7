// SPDX-License-Identifier: Apache-2.0
#include "hopper/kernels/append.h"

#include <cmath>
#include <limits>
#include <type_traits>

#include "hopper/kernels/element.cuh"
#include "hopper/launch_dependent.h"
#include "hopper/ptx/parameters.cuh"
#include "hopper/ptx/sync.cuh"

namespace sinkattn::hopper {
namespace {

constexpr int block_threads = 256;
constexpr int vector_elements = 8;  // 16 bytes; the checks guarantee the alignment

/// A row of a packed or dense tensor as token `t` of sequence `b`.
struct Token {
  bool used = false;  ///< false: the row belongs to no sequence
  std::int64_t b = 0, t = 0;
};

/// The last sequence that starts at or before `row`. Whatever the entries are, the search stays
/// inside the vector, and find_token() checks what it found.
__device__ std::int64_t search(const std::int32_t* cu_seqlens, std::int64_t batch,
                               std::int64_t row) {
  std::int64_t low = 0;
  std::int64_t high = batch;
  while (high - low > 1) {
    const std::int64_t middle = (low + high) / 2;
    if (cu_seqlens[middle] <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

/// `rows` rows per batch entry in dense tensors.
__device__ Token find_token(const SequenceSide& side, std::int64_t batch, std::uint32_t rows,
                            std::uint32_t row) {
  Token token;
  if (batch == 0) return token;
  const bool packed = side.cu_seqlens != nullptr;
  token.b = packed ? search(side.cu_seqlens, batch, row) : row / rows;
  const SequenceInfo info = resolve_sequence(side, token.b);
  token.t = packed ? row - info.first_row : row % rows;
  token.used = token.t >= 0 && token.t < info.length;
  return token;
}

/// Element offset of a slot; page entries are clamped to the pages that exist.
__device__ std::int64_t slot_offset(const KeyStorage& cache, const HeadsTensor& tensor,
                                    std::int64_t row, std::int64_t slot, int head) {
  if (cache.page_table == nullptr) return tensor.offset(row, slot, head);
  const std::uint32_t size = static_cast<std::uint32_t>(cache.page_size);
  const std::uint32_t at = static_cast<std::uint32_t>(slot);
  const std::int64_t page = clamp_index(cache.page_table[row * cache.page_table_stride + at / size],
                                        0, cache.num_pages - 1);
  return tensor.offset(page, at % size, head);
}

__device__ std::int64_t used_slots(const AppendProblem& p, std::int64_t b) {
  return clamp_index(p.cache_seqlens[b], 0, p.capacity);
}

/// Row of the rotary tables for a token `t` after the offset of sequence b, as an element offset.
__device__ std::int64_t rotary_row(const AppendProblem& p, std::int64_t b, std::int64_t t) {
  const std::int64_t offset = p.rotary_seqlens == nullptr ? used_slots(p, b) : p.rotary_seqlens[b];
  return clamp_index(offset + t, 0, p.rotary_positions - 1) * p.rotary_stride;
}

template <class T>
__device__ float to_float(T x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half2float(x);
  } else {
    return __bfloat162float(x);
  }
}

template <class T>
__device__ T from_float(float x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

template <class T>
union Vector {
  uint4 bits;
  T element[vector_elements];
  __device__ Vector() : bits{} {}
};

/// N consecutive entries of a rotary table row; `aligned`: rows start at multiples of 16 bytes.
template <int N, class T>
__device__ void load_table(const T* at, bool aligned, float (&values)[N]) {
  static_assert(N == 4 || N == 8);
  using Word = std::conditional_t<N == 4, uint2, uint4>;
  union {
    Word bits;
    T element[N];
  } entries = {};
  if (aligned) {
    entries.bits = *reinterpret_cast<const Word*>(at);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) entries.element[i] = at[i];
  }
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = to_float(entries.element[i]);
}

template <class T>
__device__ void rotate_pair(T& first, T& second, float cosine, float sine) {
  const float x = to_float(first);
  const float y = to_float(second);
  first = from_float<T>(x * cosine - y * sine);
  second = from_float<T>(x * sine + y * cosine);
}

/// What happens to a chunk (8 elements) of a head vector. Without interleaving the thread of a
/// chunk in the first half of the rotary dim does the partner in the second half as well.
enum class Rotation { none, interleaved, with_partner, by_partner };

__device__ Rotation rotation_of(const AppendProblem& p, int chunk) {
  const int first = vector_elements * chunk;
  if (first >= static_cast<int>(p.rotary_dim)) return Rotation::none;
  if (p.rotary_interleaved) return Rotation::interleaved;
  return 2 * first < static_cast<int>(p.rotary_dim) ? Rotation::with_partner : Rotation::by_partner;
}

/// A chunk on its way, and its partner if it has one. Loaded before the position is known: the two
/// ways to memory then overlap.
template <class T>
struct MovingChunk {
  Rotation rotation;
  int at, partner_at;
  Vector<T> own, partner;

  __device__ MovingChunk(Rotation how, const T* from, int chunk, int rotary_dim)
      : rotation(how), at(vector_elements * chunk), partner_at(at + rotary_dim / 2) {
    own.bits = *reinterpret_cast<const uint4*>(from + at);
    if (rotation == Rotation::with_partner) {
      partner.bits = *reinterpret_cast<const uint4*>(from + partner_at);
    }
  }

  /// Rotates by row `table_row` of the tables.
  __device__ void rotate(const AppendProblem& p, bool aligned, std::int64_t table_row) {
    const T* cosines = static_cast<const T*>(p.rotary_cos) + table_row;
    const T* sines = static_cast<const T*>(p.rotary_sin) + table_row;
    if (rotation == Rotation::interleaved) {
      constexpr int pairs = vector_elements / 2;
      float cosine[pairs], sine[pairs];
      load_table(cosines + at / 2, aligned, cosine);
      load_table(sines + at / 2, aligned, sine);
#pragma unroll
      for (int i = 0; i < pairs; ++i) {
        rotate_pair(own.element[2 * i], own.element[2 * i + 1], cosine[i], sine[i]);
      }
    } else if (rotation == Rotation::with_partner) {
      float cosine[vector_elements], sine[vector_elements];
      load_table(cosines + at, aligned, cosine);
      load_table(sines + at, aligned, sine);
#pragma unroll
      for (int i = 0; i < vector_elements; ++i) {
        rotate_pair(own.element[i], partner.element[i], cosine[i], sine[i]);
      }
    }
  }

  __device__ void store(T* to) const {
    if (rotation == Rotation::by_partner) return;
    *reinterpret_cast<uint4*>(to + at) = own.bits;
    if (rotation == Rotation::with_partner) {
      *reinterpret_cast<uint4*>(to + partner_at) = partner.bits;
    }
  }
};

template <class T>
__device__ void append_token(const AppendProblem& p, bool aligned, std::uint32_t row) {
  const Token token =
      find_token(p.side_new, p.batch, static_cast<std::uint32_t>(p.longest_new), row);
  if (!token.used) return;
  const bool packed = p.side_new.cu_seqlens != nullptr;
  const std::int64_t batch = packed ? 0 : token.b;
  const std::int64_t from_row = packed ? row : token.t;
  const int key_chunks = static_cast<int>(p.head_dim) / vector_elements;
  const int chunks = key_chunks + static_cast<int>(p.head_dim_v) / vector_elements;
  for (int item = threadIdx.x; item < static_cast<int>(p.heads_kv) * chunks;
       item += block_threads) {
    const int head = item / chunks;
    const int chunk = item % chunks;
    const bool is_key = chunk < key_chunks;
    const HeadsTensor& from = is_key ? p.key_new : p.value_new;
    const HeadsTensor& to = is_key ? p.cache.key : p.cache.value;
    const T* source = static_cast<const T*>(from.data) + from.offset(batch, from_row, head);
    MovingChunk<T> moving(is_key ? rotation_of(p, chunk) : Rotation::none, source,
                          is_key ? chunk : chunk - key_chunks, static_cast<int>(p.rotary_dim));
    const std::int64_t slot = used_slots(p, token.b) + token.t;
    if (slot >= p.capacity) return;  // writes past the capacity are dropped
    if (moving.rotation != Rotation::none) {
      moving.rotate(p, aligned, rotary_row(p, token.b, token.t));
    }
    moving.store(static_cast<T*>(to.data) +
                 slot_offset(p.cache, to, p.cache.cache_row(token.b), slot, head));
  }
}

/// One row of the query tensor, all heads; rows outside every sequence become zero.
template <class T>
__device__ void rotate_query(const AppendProblem& p, bool aligned, std::uint32_t row) {
  const Token token = find_token(p.side_q, p.batch, static_cast<std::uint32_t>(p.rows_q), row);
  const std::int64_t batch = p.packed_q ? 0 : token.b;
  const std::int64_t at_row = p.packed_q ? row : row % static_cast<std::uint32_t>(p.rows_q);
  const int chunks = static_cast<int>(p.head_dim) / vector_elements;
  for (int item = threadIdx.x; item < static_cast<int>(p.heads_q) * chunks; item += block_threads) {
    const int head = item / chunks;
    const int chunk = item % chunks;
    const T* source = static_cast<const T*>(p.query.data) + p.query.offset(batch, at_row, head);
    T* target = static_cast<T*>(p.query_rotated.data) + p.query_rotated.offset(batch, at_row, head);
    if (!token.used) {
      *reinterpret_cast<uint4*>(target + vector_elements * chunk) = make_uint4(0, 0, 0, 0);
      continue;
    }
    MovingChunk<T> moving(rotation_of(p, chunk), source, chunk, static_cast<int>(p.rotary_dim));
    moving.rotate(p, aligned, rotary_row(p, token.b, p.rotate_queries_by_position ? token.t : 0));
    moving.store(target);
  }
}

__device__ void count_slots(const AppendProblem& p, std::int64_t b) {
  if (b >= p.batch || p.seqused_after == nullptr) return;
  const std::int64_t used = used_slots(p, b);
  const std::int64_t added = resolve_sequence(p.side_new, b).length;
  const std::int64_t room = p.capacity - used;
  p.seqused_after[b] = static_cast<std::int32_t>(used + (added < room ? added : room));
}

/// Blocks: one per new row, one per query row (with rotary), then the used slots of 256 sequences.
/// The next grid may start only when the blocks are nearly done: blocks of the decode kernel that
/// come early are spread unevenly between them, and then read heads of the same tokens out of step.
template <class T>
__global__ void __launch_bounds__(block_threads)
    append_kernel(const __grid_constant__ AppendProblem p, unsigned new_rows, unsigned query_rows,
                  bool aligned) {
  ptx::fetch_parameters(p);
  ptx::wait_for_previous_grid();
  const unsigned block = blockIdx.x;
  if (block < new_rows) {
    append_token<T>(p, aligned, block);
  } else if (block < new_rows + query_rows) {
    rotate_query<T>(p, aligned, block - new_rows);
  } else {
    count_slots(
        p, static_cast<std::int64_t>(block - new_rows - query_rows) * block_threads + threadIdx.x);
  }
  ptx::launch_dependent_grids();  // they wait for this grid to end before they read
}

}  // namespace

Status launch_append(const AppendProblem& p, cudaStream_t stream) {
  const bool packed = p.side_new.cu_seqlens != nullptr;
  const std::int64_t new_rows = packed ? p.longest_new : p.batch * p.longest_new;
  const std::int64_t query_rows =
      p.rotary_dim == 0 ? 0 : (p.packed_q ? p.rows_q : p.batch * p.rows_q);
  const std::int64_t grid = new_rows + query_rows + (p.batch + block_threads - 1) / block_threads;
  if (grid > std::numeric_limits<std::int32_t>::max()) {
    return Status::error(StatusCode::not_implemented,
                         "k: expected fewer than 2^31 new tokens and queries, got more");
  }
  if (grid == 0) return {};
  const auto low_bits = reinterpret_cast<std::uintptr_t>(p.rotary_cos) |
                        reinterpret_cast<std::uintptr_t>(p.rotary_sin) |
                        static_cast<std::uintptr_t>(2 * p.rotary_stride);
  const bool aligned = low_bits % 16 == 0;
  const auto launch = [&](auto kernel) {
    return launch_dependent(
        "append_kernel", kernel, LaunchSize{static_cast<int>(grid), block_threads}, stream, p,
        static_cast<unsigned>(new_rows), static_cast<unsigned>(query_rows), aligned);
  };
  return p.cache.key.dtype == DType::bfloat16 ? launch(append_kernel<__nv_bfloat16>)
                                              : launch(append_kernel<__half>);
}

}  // namespace sinkattn::hopper
