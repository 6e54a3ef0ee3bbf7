// SPDX-License-Identifier: Apache-2.0
// The query pass: dQ of 128 rows of one query head, without an accumulator in memory.
//
// A block holds Q and dO of 128 rows and walks over the key tiles they see, like a forward:
//   S = Q K^T, dP = dO V^T, P = exp2(S c - LSE2), dS = P (dP - D'), dQ += dS K.
// S and dP are computed again in the key pass. That costs 40 % more matrix products and saves the
// fp32 accumulator: every row has one writer, so this is the deterministic form, and what runs
// where only dQ is wanted.
#pragma once

#include "hopper/backward_tuning.h"
#include "hopper/core/backward_gradient.cuh"
#include "hopper/core/backward_load.cuh"
#include "hopper/core/backward_work.cuh"
#include "hopper/core/tile.cuh"
#include "hopper/ptx/mbarrier.cuh"
#include "hopper/ptx/sync.cuh"
#include "hopper/ptx/wgmma.cuh"

namespace sinkattn::hopper {

template <class T_, int D_, int DV_, bool Softcap_>
struct QueryPass {
  using T = T_;
  using Tuning = QueryPassTuning<D_, DV_>;
  static constexpr int d = D_, dv = DV_;
  static constexpr bool softcap = Softcap_, overlap = Tuning::overlap && !Softcap_;
  static constexpr int queries = 128, warpgroup_queries = 64, threads = 384;
  static constexpr int keys = Tuning::keys, stages = Tuning::stages;
  static constexpr int producer_registers = 24, main_registers = 240;
  using QueryTile = Tile<queries, d>;
  using DoutTile = Tile<queries, dv>;
  using KeyTile = Tile<keys, d>;
  using ValueTile = Tile<keys, dv>;
};

template <class C>
struct QueryPassSmem {
  static constexpr int query = 0;
  static constexpr int dout = query + C::QueryTile::bytes;
  static constexpr int key = dout + C::DoutTile::bytes;
  static constexpr int value = key + C::stages * C::KeyTile::bytes;
  static constexpr int intervals = value + C::stages * C::ValueTile::bytes;
  static constexpr int barriers = intervals + C::queries * 8;
  static constexpr int bytes = barriers + 8 * (1 + 3 * C::stages);
  static constexpr int allocated = bytes + 1024;  ///< dynamic memory is aligned by hand
  static_assert(key % 1024 == 0 && value % 1024 == 0 && barriers % 8 == 0);
  static_assert(allocated <= 232448, "227 KiB per block");
};

template <class C>
struct QueryPassBarriers {
  std::uint64_t* queries_full;  ///< Q, dO loaded: producer's expect_tx -> mains
  std::uint64_t* key_full;      ///< [stage] K loaded -> mains
  std::uint64_t* value_full;    ///< [stage] V loaded -> mains
  std::uint64_t* stage_empty;   ///< [stage] the 8 main warps are done with K and V -> producer

  __device__ explicit QueryPassBarriers(char* smem) {
    queries_full = reinterpret_cast<std::uint64_t*>(smem + QueryPassSmem<C>::barriers);
    key_full = queries_full + 1;
    value_full = key_full + C::stages;
    stage_empty = value_full + C::stages;
  }

  __device__ void init() const {
    ptx::mbarrier_init(queries_full, 1);
    for (int i = 0; i < C::stages; ++i) {
      ptx::mbarrier_init(key_full + i, 1);
      ptx::mbarrier_init(value_full + i, 1);
      ptx::mbarrier_init(stage_empty + i, 8);
    }
    ptx::mbarrier_init_fence();
  }
};

/// What a block works on: rows of one query head, and the key tiles [first_tile, end_tile).
struct QueryPassWork {
  SequencePair sequence;
  int head, first_row, first_tile, end_tile;

  __device__ QueryPassWork(const BackwardArguments& p, const BlockPlace& place, int queries,
                           int keys)
      : sequence(p, place.pair / p.heads_q) {
    head = place.pair % p.heads_q;
    // The last rows of a causal mask see the most keys; they start first.
    first_row = (p.tiles - 1 - place.tile) * queries;
    const std::int64_t sq = sequence.queries.length;
    const std::int64_t sk = sequence.keys.length;
    first_tile = 0;
    end_tile = 0;
    if (first_row >= sq) return;
    const std::int64_t last = (first_row + queries < sq ? first_row + queries : sq) - 1;
    const std::int64_t begin = visible_keys(p.mask, first_row, sq, sk).begin;
    const std::int64_t end = visible_keys(p.mask, last, sq, sk).end;
    if (begin >= end) return;
    first_tile = static_cast<int>(begin / keys);
    end_tile = static_cast<int>((end + keys - 1) / keys);
  }
};

/// Issues the copies of a block; one lane.
template <class C>
__device__ __forceinline__ void query_pass_producer(const BackwardArguments& p,
                                                    const QueryPassWork& work,
                                                    const QueryPassBarriers<C>& barriers,
                                                    char* smem) {
  using Smem = QueryPassSmem<C>;
  const std::uint32_t base = ptx::shared_address(smem);
  const int b = work.sequence.b;
  const SequenceInfo& queries = work.sequence.queries;
  ptx::mbarrier_arrive_expect_tx(barriers.queries_full,
                                 C::QueryTile::bytes + (p.has_dout ? C::DoutTile::bytes : 0));
  TileSource(&p.query, p.rows_q, queries, p.packed_q ? 0 : b)
      .template load<typename C::QueryTile, backward_tile_queries>(
          base + Smem::query, barriers.queries_full, work.first_row, work.head);
  if (p.has_dout) {
    TileSource(&p.dout, p.rows_q, queries, p.packed_q ? 0 : b)
        .template load<typename C::DoutTile, backward_tile_queries>(
            base + Smem::dout, barriers.queries_full, work.first_row, work.head);
  }
  const TileSource key(&p.key, p.rows_k, work.sequence.keys, p.packed_k ? 0 : b);
  const TileSource value(&p.value, p.rows_k, work.sequence.keys, p.packed_k ? 0 : b);
  const int kv_head = work.head / p.group;
  RingPosition<C::stages> ring;
  for (int tile = work.first_tile; tile < work.end_tile; ++tile) {
    ptx::mbarrier_wait(barriers.stage_empty + ring.slot, ring.phase ^ 1);  // <- release()
    ptx::mbarrier_arrive_expect_tx(barriers.key_full + ring.slot, C::KeyTile::bytes);
    key.template load<typename C::KeyTile, C::keys>(
        base + Smem::key + ring.slot * C::KeyTile::bytes, barriers.key_full + ring.slot,
        tile * C::keys, kv_head);
    ptx::mbarrier_arrive_expect_tx(barriers.value_full + ring.slot, C::ValueTile::bytes);
    value.template load<typename C::ValueTile, C::keys>(
        base + Smem::value + ring.slot * C::ValueTile::bytes, barriers.value_full + ring.slot,
        tile * C::keys, kv_head);
    ring.advance();
  }
}

/// One main warpgroup: 64 rows.
template <class C>
struct QueryPassMain {
  using T = typename C::T;
  using Smem = QueryPassSmem<C>;
  static constexpr int score_registers = C::keys / 2;
  static constexpr int key_blocks = C::keys / 16;  ///< k16 steps of dQ

  const BackwardArguments& p;
  const QueryPassWork& work;
  const QueryPassBarriers<C>& barriers;
  char* smem;
  int group, warp, lane, quad, row;  ///< row: this thread's first row in the tile; the other is + 8

  __device__ __forceinline__ QueryPassMain(const BackwardArguments& p_, const QueryPassWork& work_,
                                           const QueryPassBarriers<C>& barriers_, char* smem_)
      : p(p_), work(work_), barriers(barriers_), smem(smem_) {
    group = static_cast<int>(threadIdx.x) / 128 - 1;
    warp = threadIdx.x % 128 / 32;
    lane = threadIdx.x % 32;
    quad = lane % 4;
    row = group * C::warpgroup_queries + warp * 16 + lane / 4;
  }

  /// (64 rows) x (a key tile) of A B^T: S from Q and K, dP from dO and V.
  template <class RowTile, class KeyTile>
  __device__ __forceinline__ void multiply_rows(float (&x)[score_registers], int a_offset,
                                                int b_offset) const {
    const std::uint64_t a = descriptor::k_major(ptx::shared_address(smem + a_offset) +
                                                group * C::warpgroup_queries * slab_row_bytes);
    const std::uint64_t b = descriptor::k_major(ptx::shared_address(smem + b_offset));
#pragma unroll
    for (int k = 0; k < RowTile::columns / 16; ++k) {
      ptx::wgmma_ss<T, C::keys>(x, a + descriptor::k_step<RowTile::slab_bytes>(k),
                                b + descriptor::k_step<KeyTile::slab_bytes>(k), k != 0);
    }
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void multiply_keys(float (&dq)[C::d / 2],
                                                const std::uint32_t (&a)[key_blocks][4],
                                                int stage) const {
    const std::uint64_t b = descriptor::mn_major(
        ptx::shared_address(smem + Smem::key + stage * C::KeyTile::bytes), C::KeyTile::slab_bytes);
#pragma unroll
    for (int k = 0; k < key_blocks; ++k) {
      ptx::wgmma_rs<T, C::d, ptx::Major::mn>(dq, a[k], b + k * descriptor::mn_step, 1);
    }
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void release(int stage) const {
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(barriers.stage_empty + stage);  // -> producer
  }

  /// A statistic of this thread's two rows.
  __device__ __forceinline__ RowStatistics statistics(const float* values) const {
    const float* mine = values + work.sequence.statistics(p, work.head) + work.first_row + row;
    return {mine[0], mine[8]};
  }

  /// True where every row of this warpgroup sees all keys of the tile.
  __device__ __forceinline__ bool all_visible(int tile) const {
    const auto* all = reinterpret_cast<const VisibleInterval*>(smem + Smem::intervals);
    const std::int64_t left = work.sequence.queries.length - work.first_row;
    const int first = group * C::warpgroup_queries;
    const int last = min(first + C::warpgroup_queries, static_cast<int>(left)) - 1;
    if (last < first) return true;  // rows past the sequence: their P is 0
    return all[last].begin <= tile * C::keys &&
           (tile + 1) * C::keys <= all[first].begin + static_cast<int>(all[first].size);
  }

  /// dS of a tile as operand A. With softcap `w` is P times the derivative of the cap.
  __device__ __forceinline__ void gradients(std::uint32_t (&dsa)[key_blocks][4],
                                            float (&s)[score_registers],
                                            float (&dp)[score_registers], RowStatistics& lse2,
                                            RowStatistics& softmax_d) const {
    if constexpr (C::softcap) {
      std::uint32_t unused[key_blocks][4], w[key_blocks][4];
      capped_probabilities<T>(s, unused, w, p, lse2);
      ptx::wgmma_wait<0>();  // dP
      score_gradients<T>(dp, w, softmax_d);
    } else {
      probabilities(s, p, lse2);
      ptx::wgmma_wait<0>();  // dP
      score_gradients(dp, s, softmax_d);
    }
    pack_operand<T>(dsa, dp);
  }

  __device__ __forceinline__ void run_tiles(float (&dq)[C::d / 2]) const {
    RowStatistics lse2 = statistics(p.lse2);
    RowStatistics softmax_d = statistics(p.softmax_d);
    RingPosition<C::stages> ring;
    int previous = 0;
    int tile = work.first_tile;
    do {
      float s[score_registers], dp[score_registers];
      std::uint32_t dsa[key_blocks][4];
      const int stage = ring.slot;
      ptx::mbarrier_wait(barriers.key_full + stage, ring.phase);
      ptx::wgmma_fence();
      multiply_rows<typename C::QueryTile, typename C::KeyTile>(
          s, Smem::query, Smem::key + stage * C::KeyTile::bytes);
      ptx::mbarrier_wait(barriers.value_full + stage, ring.phase);
      ptx::wgmma_fence();
      multiply_rows<typename C::DoutTile, typename C::ValueTile>(
          dp, Smem::dout, Smem::value + stage * C::ValueTile::bytes);
      ptx::wgmma_wait<1>();  // S, and dQ of the previous tile
      if (C::overlap && tile != work.first_tile) release(previous);
      gradients(dsa, s, dp, lse2, softmax_d);
      if (!all_visible(tile)) {
        keep_visible(dsa,
                     visible_registers<score_registers>(
                         reinterpret_cast<const VisibleInterval*>(smem + Smem::intervals) + row,
                         tile * C::keys, quad));
      }
      ptx::wgmma_fence();
      multiply_keys(dq, dsa, stage);
      if constexpr (!C::overlap) {
        ptx::wgmma_wait<0>();
        release(stage);
      }
      previous = stage;
      ring.advance();
    } while (++tile < work.end_tile);
    if constexpr (C::overlap) ptx::wgmma_wait<0>();
  }

  __device__ __forceinline__ void store(const float (&dq)[C::d / 2]) const {
    const std::int64_t batch = p.packed_q ? 0 : work.sequence.b;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::int64_t i = work.first_row + row + 8 * half;
      if (i >= work.sequence.queries.length) continue;
      T* to = static_cast<T*>(p.dq.data) +
              p.dq.offset(batch, work.sequence.queries.first_row + i, work.head) + 2 * quad;
#pragma unroll
      for (int j = 0; j < C::d / 8; ++j) {
        if (8 * j >= p.head_dim) break;
        *reinterpret_cast<std::uint32_t*>(to + 8 * j) = ptx::pack<T>(
            dq[4 * j + 2 * half] * p.softmax_scale, dq[4 * j + 2 * half + 1] * p.softmax_scale);
      }
    }
  }

  __device__ __forceinline__ void run() const {
    float dq[C::d / 2];
#pragma unroll
    for (int i = 0; i < C::d / 2; ++i) dq[i] = 0.0f;
    if (work.first_tile < work.end_tile) {
      ptx::mbarrier_wait(barriers.queries_full, 0);
      run_tiles(dq);
    }
    store(dq);
  }
};

template <class C>
__global__ void __launch_bounds__(C::threads, 1)
    backward_queries_kernel(const __grid_constant__ BackwardArguments p) {
  using Smem = QueryPassSmem<C>;
  extern __shared__ char unaligned[];
  char* smem = unaligned + (1024 - ptx::shared_address(unaligned) % 1024) % 1024;
  const BlockPlace place = place_block(blockIdx.x, p.batch * p.heads_q, p.tiles, p.section);
  const QueryPassWork work(p, place, C::queries, C::keys);
  if (work.first_row >= work.sequence.queries.length) return;
  const QueryPassBarriers<C> barriers(smem);
  if (threadIdx.x == 0) barriers.init();
  if (threadIdx.x < C::queries) {
    reinterpret_cast<VisibleInterval*>(smem + Smem::intervals)[threadIdx.x] =
        keys_of_query(p.mask, work.first_row + static_cast<int>(threadIdx.x),
                      work.sequence.queries.length, work.sequence.keys.length);
  }
  if (!p.has_dout) {
    auto* dout = reinterpret_cast<uint4*>(smem + Smem::dout);
    for (int i = threadIdx.x; i < C::DoutTile::bytes / 16; i += C::threads) {
      dout[i] = make_uint4(0, 0, 0, 0);
    }
    ptx::fence_proxy_async_shared();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    ptx::registers_decrease<C::producer_registers>();
    if (threadIdx.x == 0 && work.first_tile < work.end_tile) {
      query_pass_producer<C>(p, work, barriers, smem);
    }
  } else {
    ptx::registers_increase<C::main_registers>();
    QueryPassMain<C>(p, work, barriers, smem).run();
  }
}

}  // namespace sinkattn::hopper
