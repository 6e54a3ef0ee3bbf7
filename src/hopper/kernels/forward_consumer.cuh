// SPDX-License-Identifier: Apache-2.0
// The general forward kernel, its consumers: a warpgroup computes 64 query rows of a tile.
#pragma once

#include "common/schedule.h"
#include "hopper/core/softmax.cuh"
#include "hopper/kernels/element.cuh"
#include "hopper/kernels/forward_smem.cuh"
#include "hopper/ptx/matrix.cuh"
#include "hopper/ptx/mbarrier.cuh"
#include "hopper/ptx/sync.cuh"
#include "hopper/ptx/tma.cuh"
#include "hopper/ptx/wgmma.cuh"

namespace sinkattn::hopper {

/// Keys that this thread's two rows see; rows past the end see none.
template <class C>
__device__ inline RowIntervals row_intervals(const ForwardArguments& a, const TileInfo& tile,
                                             int first_row) {
  RowIntervals rows;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first_row + 8 * r;
    const BasicRange<int> keys = row < tile.length
                                     ? visible_keys(a.mask, row, tile.length, tile.keys)
                                     : BasicRange<int>{0, 0};
    rows.begin[r] = keys.begin;
    rows.end[r] = keys.end;
  }
  return rows;
}

/// Key blocks of a tile that the rows of one warpgroup see.
struct WarpgroupBlocks {
  int begin, end;
  int full_begin, full_end;  ///< blocks that need no mask
};

/// State of one consumer warpgroup over its tiles.
template <class C>
struct Consumer {
  using Smem = ForwardSmem<C>;
  using Element = typename C::Element;
  static constexpr int score_registers = C::tile_n / 2;
  static constexpr int out_registers = C::head_dim_v / 2;
  static constexpr int key_steps = C::tile_n / 16;
  /// Sum of a thread's exponentials of one row and block up to which fp16 holds each of them with
  /// room to spare. Above what exponentials within the limit of take_maximum() add up to, so that
  /// a row over it has a maximum over that limit.
  static constexpr float most_of_block = 16384.0f;
  static_assert(C::tile_n / 4 * 256.0f < most_of_block);

  const ForwardArguments& a;
  Smem& smem;
  const int warpgroup;
  RingPosition<C::query_stages> q;
  RingPosition<C::stages> k, v;

  /// Issues S = Q K^T of the block in stage k.
  __device__ inline void issue_scores(float (&s)[score_registers]) {
    const std::uint64_t query = descriptor::k_major(ptx::shared_address(smem.query[q.stage]) +
                                                    warpgroup * 64 * slab_row_bytes);
    const std::uint64_t key = descriptor::k_major(ptx::shared_address(smem.key[k.stage]));
    ptx::wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < C::head_dim / 16; ++kk) {
      ptx::wgmma_ss<Element, C::tile_n>(s, query + descriptor::k_step<Smem::Query::slab_bytes>(kk),
                                        key + descriptor::k_step<Smem::Key::slab_bytes>(kk),
                                        kk > 0);
    }
    ptx::wgmma_commit();
  }

  /// Issues O += P V of the block in stage v.
  __device__ inline void issue_output(float (&o)[out_registers],
                                      const std::uint32_t (&p)[key_steps][4]) {
    const std::uint64_t value =
        descriptor::mn_major(ptx::shared_address(smem.value[v.stage]), Smem::Value::slab_bytes);
    ptx::wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < key_steps; ++kk) {
      ptx::wgmma_rs<Element, C::head_dim_v, ptx::Major::mn>(o, p[kk],
                                                            value + kk * descriptor::mn_step, 1);
    }
    ptx::wgmma_commit();
  }

  __device__ inline void release_key() {
    if (threadIdx.x % 128 == 0) ptx::mbarrier_arrive(&smem.key_empty[k.stage]);
    k.advance();
  }
  __device__ inline void release_value() {
    if (threadIdx.x % 128 == 0) ptx::mbarrier_arrive(&smem.value_empty[v.stage]);
    v.advance();
  }
  __device__ inline void wait_key() { ptx::mbarrier_wait(&smem.key_full[k.stage], k.parity); }
  __device__ inline void wait_value() { ptx::mbarrier_wait(&smem.value_full[v.stage], v.parity); }

  // Barrier 1 + w is warpgroup w's turn: it waits there, its predecessor arrives. Without turns
  // everyone is its own successor: ptxas compiles the loop without spills only with the barriers.
  static constexpr int turn_threads = 256;
  __device__ inline int successor() const {
    return C::turns ? (warpgroup + 1) % C::warpgroups : warpgroup;
  }
  __device__ inline void take_turn() { ptx::named_barrier_sync(1 + warpgroup, turn_threads); }
  __device__ inline void pass_turn() { ptx::named_barrier_arrive(1 + successor(), turn_threads); }

  __device__ inline WarpgroupBlocks warpgroup_blocks(const TileInfo& tile) const {
    const int row = tile.first_position + 64 * warpgroup;
    const BasicKeyBlocks<int> seen =
        key_blocks(a.mask, row, row + 64, tile.length, tile.keys, C::tile_n);
    return {max(seen.n_begin, tile.block_begin), min(seen.n_end, tile.block_end), seen.n_full_begin,
            seen.n_full_end};
  }

  __device__ static inline void pack_probabilities(const float (&s)[score_registers],
                                                   std::uint32_t (&p)[key_steps][4]) {
#pragma unroll
    for (int i = 0; i < score_registers; i += 2) {
      p[i / 8][i % 8 / 2] = ptx::pack<Element>(s[i], s[i + 1]);
    }
  }

  __device__ static inline void rescale_output(float (&o)[out_registers],
                                               const float (&rescale)[2]) {
    if (!__any_sync(0xffffffffu, rescale[0] != 1.0f || rescale[1] != 1.0f)) return;
#pragma unroll
    for (int i = 0; i < out_registers; ++i) o[i] *= rescale[row_of(i)];
  }

  /// Scores of a block -> probabilities, by way of the maxima; O follows where a reference moves.
  __device__ inline void move_references(float (&s)[score_registers], const float (&limit)[2],
                                         OnlineSoftmax& softmax, std::uint32_t (&p)[key_steps][4],
                                         float (&o)[out_registers]) {
    float rescale[2];
    softmax.take_maximum(s, a.scale_log2, limit, rescale);
    softmax.exponentiate(s, a.scale_log2);
    pack_probabilities(s, p);
    rescale_output(o, rescale);
  }

  /// Softmax of `block`. A block without a mask is tried without its maxima, which are a third of
  /// the work, unless it is the tile's first and there is no reference yet.
  __device__ inline void exponentiate_block(float (&s)[score_registers],
                                            const WarpgroupBlocks& blocks, int block, bool first,
                                            const RowIntervals& rows, OnlineSoftmax& softmax,
                                            std::uint32_t (&p)[key_steps][4],
                                            float (&o)[out_registers]) {
    float limit[2] = {a.rescale_limit, a.rescale_limit};
    if (a.softcap > 0.0f) cap_scores(s, a.scale_over_cap, a.softcap);
    if (block < blocks.full_begin || block >= blocks.full_end) {
      mask_scores(s, block * C::tile_n + 2 * static_cast<int>(threadIdx.x % 4), rows);
    } else if (!first &&
               softmax.keep_reference<Element>(s, a.scale_log2, most_of_block, p, limit)) {
      return;
    }
    move_references(s, limit, softmax, p, o);
  }

  /// Gives `count` blocks back unread: no row of this warpgroup sees them. `turns` of them take
  /// part in the issue order of the other warpgroups.
  __device__ inline void skip_blocks(int count, int turns) {
    for (int i = 0; i < count; ++i) {
      wait_key();
      wait_value();
      // One thread releases for all: no warp may lag behind a barrier by more than one phase.
      ptx::named_barrier_sync(1 + C::warpgroups + warpgroup, 128);
      release_key();
      release_value();
      if (i < turns) {
        take_turn();
        pass_turn();
      }
    }
  }

  /// Blocks from the last to the first: S of block n - 1 is issued, then P V of block n.
  __device__ inline void compute_blocks(const WarpgroupBlocks& blocks, const RowIntervals& rows,
                                        OnlineSoftmax& softmax, float (&o)[out_registers]) {
    float s[score_registers];
    std::uint32_t p[key_steps][4];
    wait_key();
    issue_scores(s);
    ptx::wgmma_wait<0>();
    release_key();
    exponentiate_block(s, blocks, blocks.end - 1, true, rows, softmax, p, o);
    for (int block = blocks.end - 2; block >= blocks.begin; --block) {
      wait_key();
      take_turn();
      issue_scores(s);
      wait_value();
      issue_output(o, p);
      pass_turn();
      ptx::wgmma_wait<1>();
      release_key();
      ptx::wgmma_wait<0>();
      release_value();
      exponentiate_block(s, blocks, block, false, rows, softmax, p, o);
    }
    wait_value();
    issue_output(o, p);
    ptx::wgmma_wait<0>();
    release_value();
  }

  /// The blocks of a tile: those that its rows see are computed, the others passed over. Of n
  /// blocks, n - 1 are issued in turns: every warpgroup's first has no P V to go with.
  __device__ inline void walk_blocks(const TileInfo& tile, int first_row, OnlineSoftmax& softmax,
                                     float (&o)[out_registers]) {
    const WarpgroupBlocks blocks = warpgroup_blocks(tile);
    const int count = tile.block_end - tile.block_begin;
    if (blocks.begin >= blocks.end) {
      skip_blocks(count, count - 1);
      return;
    }
    skip_blocks(tile.block_end - blocks.end, count);
    compute_blocks(blocks, row_intervals<C>(a, tile, first_row), softmax, o);
    skip_blocks(blocks.begin - tile.block_begin, count);
  }

  /// Output rows of a warp -> its own rows of the query tile -> memory. The copy engine clips at
  /// the end of the sequence.
  __device__ inline void store_output(const TileInfo& tile, const float (&o)[out_registers],
                                      const float (&factor)[2]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
    const std::uint32_t base =
        ptx::shared_address(smem.query[q.stage]) + (64 * warpgroup + 16 * warp) * slab_row_bytes;
#pragma unroll
    for (int j = 0; j < C::head_dim_v / 16; ++j) {
      const std::uint32_t address = base + j / 4 * Smem::Query::slab_bytes +
                                    swizzled_offset(lane % 16, j % 4 * 2 + lane / 16);
      const float* x = o + 8 * j;
      ptx::store_matrix_x4(address, ptx::pack<Element>(x[0] * factor[0], x[1] * factor[0]),
                           ptx::pack<Element>(x[2] * factor[1], x[3] * factor[1]),
                           ptx::pack<Element>(x[4] * factor[0], x[5] * factor[0]),
                           ptx::pack<Element>(x[6] * factor[1], x[7] * factor[1]));
    }
    ptx::fence_proxy_async_shared();
    __syncwarp();
    if (lane != 0) return;
    const int row = tile.first_position + 64 * warpgroup + 16 * warp;
    if (row < tile.length) {
#pragma unroll
      for (int slab = 0; slab < Tile<16, C::head_dim_v>::slabs; ++slab) {
        if (slab >= a.value_slabs) break;
        ptx::tma_store(&a.out, base + slab * Smem::Query::slab_bytes,
                       {slab * slab_columns, a.map_rows_q - tile.length + row,
                        tile.first_row + tile.length, tile.head, tile.batch});
      }
    }
    ptx::bulk_commit();
  }

  /// fp32 rows of one split, for the merge.
  __device__ inline void store_partial(const TileInfo& tile, const float (&o)[out_registers],
                                       const float (&factor)[2], int first_row) {
    float* base = a.out_partial + tile.split * a.partial_stride_split +
                  tile.batch * a.partial_stride_batch +
                  static_cast<std::int64_t>(tile.head) * a.head_dim_v;
    const int first_column = 2 * static_cast<int>(threadIdx.x % 4);
#pragma unroll
    for (int i = 0; i < out_registers; i += 2) {
      const int row = first_row + 8 * row_of(i), column = first_column + column_of(i);
      if (row >= tile.extent || column >= a.head_dim_v) continue;
      *reinterpret_cast<float2*>(
          base + (std::int64_t{tile.first_row} + row) * a.partial_stride_row + column) =
          row < tile.length ? make_float2(o[i] * factor[row_of(i)], o[i + 1] * factor[row_of(i)])
                            : make_float2(0.0f, 0.0f);
    }
  }

  __device__ inline void store_lse(const TileInfo& tile, const float (&lse)[2], int first_row) {
    if (a.lse.data == nullptr || threadIdx.x % 4 != 0) return;
    float* base = static_cast<float*>(a.lse.data) + tile.split * a.lse_stride_split;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + 8 * r;
      if (row >= tile.extent) continue;
      base[a.lse.offset(tile.batch, tile.head, std::int64_t{tile.first_row} + row)] =
          row < tile.length ? lse[r] : -INFINITY;
    }
  }

  /// Output rows of this warp that take no part: zeros.
  __device__ inline void zero_unused_rows(const TileInfo& tile) {
    const int lane = threadIdx.x % 32;
    const int begin = tile.first_position + 64 * warpgroup + threadIdx.x % 128 / 32 * 16;
    const int end = min(begin + 16, tile.extent);
    for (int row = max(begin, tile.length); row < end; ++row) {
      const std::int64_t offset =
          a.zero_out.offset(tile.batch, std::int64_t{tile.first_row} + row, tile.head);
      auto* out = static_cast<Element*>(a.zero_out.data) + offset;
      for (int c = lane * 8; c < a.head_dim_v; c += 32 * 8) {
        *reinterpret_cast<uint4*>(out + c) = make_uint4(0, 0, 0, 0);
      }
    }
  }

  /// The output was staged in slabs that no query is loaded to: they must be zero again.
  __device__ inline void clear_query_slabs(int stage) {
    const int lane = threadIdx.x % 32;
    unsigned char* rows =
        smem.query[stage] + (64 * warpgroup + threadIdx.x % 128 / 32 * 16) * slab_row_bytes;
    for (int slab = a.query_slabs; slab < a.value_slabs; ++slab) {
      for (int i = lane; i < 16 * slab_row_bytes / 16; i += 32) {
        reinterpret_cast<uint4*>(rows + slab * Smem::Query::slab_bytes)[i] = make_uint4(0, 0, 0, 0);
      }
    }
    ptx::fence_proxy_async_shared();
  }

  /// The query stage is free once the output has left it. One lane of each warp arrives.
  __device__ inline void release_query(int stage) {
    if (threadIdx.x % 32 == 0) ptx::bulk_wait_read<0>();
    __syncwarp();  // and every lane has read what it needs of the tile's description
    if (a.query_slabs < a.value_slabs) {
      clear_query_slabs(stage);
      __syncwarp();
    }
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&smem.query_empty[stage]);
    __syncwarp();
  }

  __device__ inline void finish_tile(const TileInfo& tile, const OnlineSoftmax& softmax,
                                     const float (&o)[out_registers], int first_row) {
    const float sink = load_sink(a.sink, tile.head);
    float factor[2], lse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const RowResult result =
          finish_row(softmax.maximum[r], quad_sum(softmax.sum[r]), a.scale, sink);
      factor[r] = result.factor;
      lse[r] = result.lse;
    }
    store_lse(tile, lse, first_row);
    if (a.out_partial != nullptr) {
      store_partial(tile, o, factor, first_row);
      return;
    }
    store_output(tile, o, factor);
    zero_unused_rows(tile);
  }

  __device__ inline void run() {
    const int row_in_tile = 64 * warpgroup + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    // The first turn is warpgroup 0's.
    if (!C::turns || warpgroup == C::warpgroups - 1) pass_turn();
    while (true) {
      ptx::mbarrier_wait(&smem.query_full[q.stage], q.parity);  // arrive: load_tiles
      const TileInfo& tile = smem.tile[q.stage];
      if (!tile.valid) break;
      const int first_row = tile.first_position + row_in_tile;
      OnlineSoftmax softmax;
      float o[out_registers] = {};
      if (tile.block_begin < tile.block_end) walk_blocks(tile, first_row, softmax, o);
      finish_tile(tile, softmax, o, first_row);
      release_query(q.stage);
      q.advance();
    }
    // Nobody waits for the last turn that was passed on.
    if (!C::turns || warpgroup == 0) take_turn();
  }
};

}  // namespace sinkattn::hopper
