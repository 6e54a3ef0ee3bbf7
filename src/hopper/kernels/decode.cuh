// SPDX-License-Identifier: Apache-2.0
// The decode kernel: few query rows against a long cache, at the speed of memory.
//
// A block holds one tile of packed query rows (row = position * group + head in group) of one KV
// head and walks over its keys. Its four warps stream keys independently, each through a ring of
// its own (core/decode_stream.cuh), keep a running softmax each (core/decode_rows.cuh), and are
// merged at the end of the piece (core/decode_merge.cuh). Which keys a block has: decode_work.cuh.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "hopper/core/decode_merge.cuh"
#include "hopper/core/decode_rows.cuh"
#include "hopper/core/decode_stream.cuh"
#include "hopper/core/decode_work.cuh"
#include "hopper/decode_tuning.h"
#include "hopper/kernels/decode.h"
#include "hopper/launch_dependent.h"
#include "hopper/ptx/copy_async.cuh"
#include "hopper/ptx/mbarrier.cuh"
#include "hopper/ptx/parameters.cuh"
#include "hopper/ptx/sync.cuh"

namespace sinkattn::hopper {

template <int ColumnsK, int ColumnsV_, int RowTiles_, bool Bf16>
struct DecodeConfig {
  using Element = std::conditional_t<Bf16, __nv_bfloat16, __half>;
  static constexpr DecodeTuning tuning = decode_tuning(ColumnsK, ColumnsV_, RowTiles_);
  static constexpr int Columns = ColumnsK, ColumnsV = ColumnsV_, RowTiles = RowTiles_;
  static constexpr int rows = 16 * RowTiles;
  static constexpr int keys = tuning.keys;
  static constexpr int warps = tuning.warps;
  static constexpr int threads = 32 * warps;
  static constexpr int tile_keys = warps * keys;
  using Stream = KeyStream<keys, tuning.slots, Columns, ColumnsV, tile_keys>;
  using Rows = DecodeRows<Element, RowTiles, Columns, ColumnsV, keys>;
  using Work = DecodeWork<rows, tile_keys, warps>;
  using Results = WarpResults<warps, rows, ColumnsV>;
};

/// Shared memory of a block. Where there is room the results of the warps have a place of their
/// own: then the rings fill for the next piece while the last one is finished. Else they lie in the
/// rings.
template <class C>
struct DecodeSmem {
  static constexpr int per_block = 228 * 1024 / C::tuning.blocks - 1024;
  static constexpr int most = per_block < 227 * 1024 ? per_block : 227 * 1024;
  static constexpr int rings = C::warps * C::Stream::ring_bytes;
  static constexpr int results = (int{sizeof(typename C::Results)} + 1023) / 1024 * 1024;
  static constexpr int query = C::Rows::QueryTile::bytes;
  static constexpr int work = 512;
  static constexpr bool overlap = rings + results + query + work <= most;
  static constexpr int results_at = overlap ? rings : 0;
  static constexpr int query_at = overlap ? rings + results : (rings > results ? rings : results);
  static constexpr int work_at = query_at + query;
  static constexpr int bytes = work_at + work;
  static_assert(sizeof(typename C::Work) <= work);
  static_assert(bytes <= most, "resident blocks as planned");
};

/// Starts the copies of the query tile; rows past the last are zeros.
template <class C>
__device__ void copy_query(const DecodeParams& p, const typename C::Work::Sequence& sequence,
                           const OutputRows& rows, std::uint32_t tile) {
  using Tile = typename C::Rows::QueryTile;
  constexpr int chunks = C::Columns / 8;
  const char* base = static_cast<const char*>(p.query.data);
#pragma unroll 1
  for (int item = threadIdx.x; item < C::rows * chunks; item += C::threads) {
    const int row = item / chunks;
    const int chunk = item % chunks;
    const bool valid = rows.first_row + row < sequence.rows && 8 * chunk < p.head_dim;
    std::int64_t offset = 0;
    if (valid) {
      offset = p.query.offset(rows.batch, rows.first_q + rows.position(p, row), rows.head(p, row)) +
               8 * chunk;
    }
    ptx::copy_async_16(tile + chunk / 8 * Tile::slab_bytes + swizzled_offset(row, chunk % 8),
                       base + 2 * offset, valid);
  }
  ptx::copy_async_commit();
}

/// Visible keys of this thread's rows, and the keys that every row of the tile sees.
template <class C>
__device__ BasicRange<int> limit_rows(const DecodeParams& p,
                                      const typename C::Work::Sequence& sequence,
                                      const DecodePiece& piece, int first_row, int valid_rows,
                                      typename C::Rows& state) {
  const int g = static_cast<int>(threadIdx.x % 32) / 4;
#pragma unroll
  for (int m = 0; m < C::RowTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = 16 * m + 8 * r + g;
      const auto keys = sequence.keys_of_row(p, first_row + row);
      const bool valid = row < valid_rows;
      state.limits[m].begin[r] = valid ? keys.begin : 0;
      state.limits[m].end[r] = valid ? min(keys.end, piece.key_end) : 0;
    }
  }
  return {sequence.keys_of_row(p, first_row + valid_rows - 1).begin,
          min(sequence.keys_of_row(p, first_row).end, piece.key_end)};
}

/// One warp's way through the keys of the piece.
template <class C>
__device__ void stream_keys(const DecodeParams& p, const BasicRange<int>& inside,
                            typename C::Stream& stream, typename C::Rows& state, int first,
                            int end) {
  int slot = 0;
  for (int key = first; key < end; key += C::tile_keys) {
    stream.wait();  // for the copies that start() or refill() committed Slots steps ago
    const std::uint32_t at = stream.slot_address(slot);
    state.attend(p, at, at + C::Stream::KeyTile::bytes, key,
                 key >= inside.begin && key + C::keys <= inside.end);
    __syncwarp();  // all lanes have read the slot
    stream.refill(p, slot);
    slot = slot + 1 == C::tuning.slots ? 0 : slot + 1;
  }
}

/// The warp's result to shared memory; the row sum is completed over the four lanes of a row.
template <class C>
__device__ void store_results(typename C::Rows& state, typename C::Results& results) {
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int g = static_cast<int>(threadIdx.x % 32) / 4;
  const int q = static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int m = 0; m < C::RowTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = 16 * m + 8 * r + g;
      float sum = state.sum[m][r];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (q == 0) {
        results.top[warp][row] = state.top[m][r];
        results.sum[warp][row] = sum;
      }
#pragma unroll
      for (int c = 0; c < C::ColumnsV / 8; ++c) {
        *reinterpret_cast<float2*>(&results.out[warp][row][8 * c + 2 * q]) =
            make_float2(state.out[m][c][2 * r], state.out[m][c][2 * r + 1]);
      }
    }
  }
}

/// Merge of the warps; then the row ends here, or goes to the workspace as a piece.
template <class C>
__device__ void finish_piece(const DecodeParams& p, const DecodePiece& piece,
                             const typename C::Work::Sequence& sequence,
                             const typename C::Results& results) {
  const OutputRows rows = {p.packed_q ? 0 : piece.b, sequence.first_q, piece.row_tile * C::rows,
                           piece.kv_head};
  const int valid_rows = min(C::rows, sequence.rows - rows.first_row);
  constexpr int items = C::ColumnsV / 4;
#pragma unroll 1
  for (int item = threadIdx.x; item < valid_rows * items; item += C::threads) {
    const int row = item / items;
    const int column = item % items * 4;
    const MergedRow merged =
        merge_warps<C::warps, C::rows, C::ColumnsV>(results, row, column, p.scale_log2);
    if (piece.count == 1) {
      finish_row<typename C::Element>(p, rows, row, column, merged);
    } else {
      const std::int64_t slot = DecodeSlots(p.splits, piece.entry).of(piece.index);
      store_piece<C::rows, C::ColumnsV>(p, slot, row, column, merged);
    }
  }
}

/// Starts all copies of the current piece: queries first, then this warp's ring.
template <class C>
__device__ void start_piece(const DecodeParams& p, const typename C::Work& work,
                            typename C::Stream& stream, std::uint32_t smem) {
  const DecodePiece& piece = work.piece;
  const OutputRows rows = {p.packed_q ? 0 : piece.b, work.sequence.first_q,
                           piece.row_tile * C::rows, piece.kv_head};
  const int warp = static_cast<int>(threadIdx.x / 32);
  copy_query<C>(p, work.sequence, rows, smem + DecodeSmem<C>::query_at);
  stream.start(p, smem + warp * C::Stream::ring_bytes, piece.b, piece.kv_head,
               work.sequence.first_slot, piece.key_begin + warp * C::keys, piece.key_end);
}

/// The current piece, from the copies that start_piece() has begun to the results of the warps.
template <class C>
__device__ void run_piece(const DecodeParams& p, const typename C::Work& work,
                          typename C::Stream& stream, std::uint32_t smem,
                          typename C::Results& results) {
  const DecodePiece& piece = work.piece;
  const int first_row = piece.row_tile * C::rows;
  const int valid_rows = min(C::rows, work.sequence.rows - first_row);
  const int first = piece.key_begin + static_cast<int>(threadIdx.x / 32) * C::keys;
  typename C::Rows state;
  const auto inside = limit_rows<C>(p, work.sequence, piece, first_row, valid_rows, state);
  ptx::copy_async_wait<C::tuning.slots>();  // for the queries, the oldest group
  __syncthreads();  // everyone's queries are there, and the last piece's results are read
  state.start(smem + DecodeSmem<C>::query_at);
  stream_keys<C>(p, inside, stream, state, first, piece.key_end);
  if (!DecodeSmem<C>::overlap) __syncthreads();  // all rings are idle
  store_results<C>(state, results);
}

template <class C>
__global__ void __launch_bounds__(C::threads, C::tuning.blocks)
    decode_kernel(const __grid_constant__ DecodeParams p) {
  using Smem = DecodeSmem<C>;
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& work = *reinterpret_cast<typename C::Work*>(memory + Smem::work_at);
  auto& results = *reinterpret_cast<typename C::Results*>(memory + Smem::results_at);
  const std::uint32_t smem = ptx::shared_address(memory);
  ptx::fetch_parameters(p);
  ptx::wait_for_previous_grid();
  ptx::launch_dependent_grids();  // they wait for this grid to end before they read
  work.begin(p);
  typename C::Stream stream;
  bool more = work.next(p);
  if (more) start_piece<C>(p, work, stream, smem);
  while (more) {
    run_piece<C>(p, work, stream, smem, results);
    more = work.next(p);  // its barriers: results are written, rings and queries are free
    if (Smem::overlap && more) start_piece<C>(p, work, stream, smem);
    finish_piece<C>(p, work.last_piece, work.last_sequence, results);
    if (!Smem::overlap) {
      __syncthreads();  // the results are read
      if (more) start_piece<C>(p, work, stream, smem);
    }
  }
  if (p.cuts != nullptr && threadIdx.x == 0) work.list_cut(p);
}

template <int Columns, int ColumnsV, int RowTiles, bool Bf16>
Status launch_decode_instance(const DecodeParams& params, int grid, cudaStream_t stream) {
  using C = DecodeConfig<Columns, ColumnsV, RowTiles, Bf16>;
  return launch_dependent("decode_kernel", decode_kernel<C>,
                          LaunchSize{grid, C::threads, DecodeSmem<C>::bytes}, stream, params);
}

}  // namespace sinkattn::hopper
