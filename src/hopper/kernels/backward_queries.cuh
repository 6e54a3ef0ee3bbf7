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
  static constexpr int facts = intervals + C::queries * 8;
  static constexpr int barriers = facts + 64;
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

  __device__ QueryPassWork(const BackwardArguments& p, unsigned block, int queries, int keys)
      : QueryPassWork(p, place_block(block, p.batch * p.heads_q, p.tiles, p.section), queries,
                      keys) {}

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

/// What the main warpgroups need of the block, in shared memory: computing it takes more registers
/// than they have.
struct alignas(16) QueryPassFacts {
  TileRange tiles;    ///< key tiles
  TileRange full[2];  ///< of them, those that need no mask for the rows of each main warpgroup
};
static_assert(sizeof(QueryPassFacts) <= 64);

/// Key tiles [begin, end) that rows [first, last] of a sequence see as a whole.
__device__ inline TileRange full_key_tiles(const Mask& mask, std::int64_t first, std::int64_t last,
                                           std::int64_t sq, std::int64_t sk, int keys) {
  if (last >= sq) last = sq - 1;
  if (first > last) return {0, 0x7fffffff};  // rows past the sequence: their P is 0
  const std::int64_t begin = visible_keys(mask, last, sq, sk).begin;
  const std::int64_t end = visible_keys(mask, first, sq, sk).end;
  return {static_cast<int>((begin + keys - 1) / keys), static_cast<int>(end / keys)};
}

/// Issues the copies of a block; one lane.
template <class C>
__device__ __forceinline__ void query_pass_producer(const BackwardArguments& p,
                                                    const QueryPassWork& work,
                                                    const QueryPassBarriers<C>& barriers,
                                                    char* smem) {
  using Smem = QueryPassSmem<C>;
  const std::uint32_t base = ptx::shared_address(smem);
  const int b = work.sequence.b;
  const int batch_q = p.packed_q ? 0 : b;
  const int batch_k = p.packed_k ? 0 : b;
  const TileSource query(&p.query, p.rows_q, work.sequence.queries, batch_q, p.head_dim);
  const TileSource dout(&p.dout, p.rows_q, work.sequence.queries, batch_q,
                        p.has_dout ? p.head_dim_v : 0);
  const TileSource key(&p.key, p.rows_k, work.sequence.keys, batch_k, p.head_dim);
  const TileSource value(&p.value, p.rows_k, work.sequence.keys, batch_k, p.head_dim_v);
  using QueryTile = typename C::QueryTile;
  using DoutTile = typename C::DoutTile;
  constexpr int box = backward_tile_queries;
  ptx::mbarrier_arrive_expect_tx(barriers.queries_full,
                                 query.template bytes<QueryTile, box>(work.first_row) +
                                     dout.template bytes<DoutTile, box>(work.first_row));
  query.template load<QueryTile, box>(base + Smem::query, barriers.queries_full, work.first_row,
                                      work.head);
  dout.template load<DoutTile, box>(base + Smem::dout, barriers.queries_full, work.first_row,
                                    work.head);
  const int kv_head = work.head / p.group;
  RingPosition<C::stages> ring;
  for (int tile = work.first_tile; tile < work.end_tile; ++tile) {
    ptx::mbarrier_wait(barriers.stage_empty + ring.slot, ring.phase ^ 1);  // <- release()
    ptx::mbarrier_arrive_expect_tx(barriers.key_full + ring.slot,
                                   key.template bytes<typename C::KeyTile, C::keys>(0));
    key.template load<typename C::KeyTile, C::keys>(
        base + Smem::key + ring.slot * C::KeyTile::bytes, barriers.key_full + ring.slot,
        tile * C::keys, kv_head);
    ptx::mbarrier_arrive_expect_tx(barriers.value_full + ring.slot,
                                   value.template bytes<typename C::ValueTile, C::keys>(0));
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
  const QueryPassBarriers<C>& barriers;
  char* smem;
  int group, warp, lane, quad, row;  ///< row: this thread's first row in the tile; the other is + 8

  __device__ __forceinline__ QueryPassMain(const BackwardArguments& p_,
                                           const QueryPassBarriers<C>& barriers_, char* smem_)
      : p(p_), barriers(barriers_), smem(smem_) {
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
    if (ptx::elect_one()) ptx::mbarrier_arrive(barriers.stage_empty + stage);  // -> producer
  }

  __device__ __forceinline__ const QueryPassFacts& facts() const {
    return *reinterpret_cast<const QueryPassFacts*>(smem + Smem::facts);
  }

  /// A statistic of this thread's two rows.
  __device__ __forceinline__ RowStatistics statistics(const QueryPassWork& work,
                                                      const float* values) const {
    const float* mine = values + work.sequence.statistics(p, work.head) + work.first_row + row;
    return {mine[0], mine[8]};
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
      // Where more registers are in flight ptxas serialises the products around the branch.
      if constexpr (C::d <= 96) hold_wait_below(s);
      ptx::wgmma_wait<0>();  // dP
      score_gradients(dp, s, softmax_d);
    }
    pack_operand<T>(dsa, dp);
  }

  __device__ __forceinline__ void run_tiles(float (&dq)[C::d / 2], RowStatistics& lse2,
                                            RowStatistics& softmax_d) const {
    const TileRange full = facts().full[group];
    const int end = facts().tiles.end;
    RingPosition<C::stages> ring;
    int previous = -1;
    int tile = facts().tiles.begin;
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
      if (C::overlap && previous >= 0) release(previous);
      gradients(dsa, s, dp, lse2, softmax_d);
      if (tile < full.begin || tile >= full.end) {
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
    } while (++tile < end);
    if constexpr (C::overlap) ptx::wgmma_wait<0>();
  }

  __device__ __forceinline__ void store(const QueryPassWork& work,
                                        const float (&dq)[C::d / 2]) const {
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
    if (facts().tiles.begin < facts().tiles.end) {
      const QueryPassWork work(p, opaque(blockIdx.x), C::queries, C::keys);
      RowStatistics lse2 = statistics(work, p.lse2);
      RowStatistics softmax_d = statistics(work, p.softmax_d);
      ptx::mbarrier_wait(barriers.queries_full, 0);
      run_tiles(dq, lse2, softmax_d);
    }
    // Computed again: the loop has no registers to keep it.
    store(QueryPassWork(p, opaque(blockIdx.x), C::queries, C::keys), dq);
  }
};

/// Visible keys of the block's rows and zeros where nothing is copied.
template <class C>
__device__ __forceinline__ void prepare_query_block(const BackwardArguments& p,
                                                    const QueryPassWork& work, char* smem) {
  using Smem = QueryPassSmem<C>;
  const std::int64_t sq = work.sequence.queries.length;
  const std::int64_t sk = work.sequence.keys.length;
  if (threadIdx.x < C::queries) {
    reinterpret_cast<VisibleInterval*>(smem + Smem::intervals)[threadIdx.x] =
        keys_of_query(p.mask, work.first_row + static_cast<int>(threadIdx.x), sq, sk);
  }
  if (threadIdx.x == 0) {
    auto* facts = reinterpret_cast<QueryPassFacts*>(smem + Smem::facts);
    facts->tiles = {work.first_tile, work.end_tile};
    for (int group = 0; group < 2; ++group) {
      const int first = work.first_row + group * C::warpgroup_queries;
      facts->full[group] =
          full_key_tiles(p.mask, first, first + C::warpgroup_queries - 1, sq, sk, C::keys);
    }
  }
  // Of a tile that reaches past the sequence the second box is not copied.
  const int rows = sq - work.first_row > backward_tile_queries ? C::queries : backward_tile_queries;
  clear_unused<typename C::QueryTile>(smem + Smem::query, 1, p.head_dim, rows);
  clear_unused<typename C::DoutTile>(smem + Smem::dout, 1, p.has_dout ? p.head_dim_v : 0, rows);
  clear_unused<typename C::KeyTile>(smem + Smem::key, C::stages, p.head_dim);
  clear_unused<typename C::ValueTile>(smem + Smem::value, C::stages, p.head_dim_v);
  ptx::fence_proxy_async_shared();
}

template <class C>
__global__ void __launch_bounds__(C::threads, 1)
    backward_queries_kernel(const __grid_constant__ BackwardArguments p) {
  extern __shared__ char unaligned[];
  char* smem = unaligned + (1024 - ptx::shared_address(unaligned) % 1024) % 1024;
  const QueryPassWork work(p, blockIdx.x, C::queries, C::keys);
  if (work.first_row >= work.sequence.queries.length) return;
  const QueryPassBarriers<C> barriers(smem);
  if (threadIdx.x == 0) barriers.init();
  prepare_query_block<C>(p, work, smem);
  __syncthreads();
  if (threadIdx.x < 128) {
    ptx::registers_decrease<C::producer_registers>();
    if (threadIdx.x == 0 && work.first_tile < work.end_tile) {
      query_pass_producer<C>(p, work, barriers, smem);
    }
  } else {
    ptx::registers_increase<C::main_registers>();
    QueryPassMain<C>(p, barriers, smem).run();
  }
}

}  // namespace sinkattn::hopper
