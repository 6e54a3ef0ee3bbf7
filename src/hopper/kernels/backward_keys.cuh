// SPDX-License-Identifier: Apache-2.0
// The key pass: dK, dV of 128 keys, and their contribution to dQ.
//
// A block holds K and V of 128 keys of one KV head and walks over the query tiles (64 rows) that
// see them, for all query heads of the group. Two main warpgroups own 64 keys each:
//   S^T = K Q^T, dP^T = V dO^T       P = exp2(S c - LSE2), dS = P (dP - D')
//   dV += P^T dO, dK += dS^T Q       operands P^T, dS^T are the accumulators just computed
// and put dS into a ring of shared-memory tiles. A third warpgroup turns them into dQ = dS K and
// adds that to the fp32 accumulator in L2. Nothing synchronises the block as a whole: the two main
// warpgroups drift apart until one's exponentials run under the other's matrix products.
//
// Here: shared memory, barriers, and the roles that copy and that form dQ. The main
// warpgroups are in backward_keys_main.cuh and, for large head dims, in backward_keys_wide.cuh;
// head dim 64 is in backward_keys_narrow.cuh.
#pragma once

#include "hopper/backward_tuning.h"
#include "hopper/core/backward_gradient.cuh"
#include "hopper/core/backward_load.cuh"
#include "hopper/core/backward_work.cuh"
#include "hopper/core/tile.cuh"
#include "hopper/ptx/matrix.cuh"
#include "hopper/ptx/mbarrier.cuh"
#include "hopper/ptx/sync.cuh"
#include "hopper/ptx/wgmma.cuh"

namespace sinkattn::hopper {

template <class C>
struct KeyPassMain;

template <class T_, int D_, int DV_, bool Softcap_, class Tuning_ = KeyPassTuning<D_, DV_>>
struct KeyPass {
  using T = T_;
  using Tuning = Tuning_;
  static constexpr int d = D_, dv = DV_;
  static constexpr bool softcap = Softcap_;
  static constexpr int queries = backward_tile_queries, keys = 128, warpgroup_keys = 64;
  static constexpr int stages = Tuning::stages;
  static constexpr bool query_group = true;      ///< a warpgroup of its own for dQ
  static constexpr bool heads_together = false;  ///< see QueryWalk
  static constexpr int threads = 512, first_main_group = 2;
  static constexpr bool third_adds_keys = false;
  static constexpr bool descending = false;
  static constexpr bool splits_for_l2 = true;  ///< see backward_launch.h
  static constexpr int releasing_warps = 8;    ///< of a stage
  static constexpr int gradient_slots = 0;
  using KeyTile = Tile<keys, d>;
  using ValueTile = Tile<keys, dv>;
  using QueryTile = Tile<queries, d>;
  using DoutTile = Tile<queries, dv>;
  using ScoreTile = Tile<queries, keys>;  ///< dS as [query][key], a slab per main warpgroup
  static constexpr ptx::Major score_major = ptx::Major::k;  ///< dS as operand A of dQ
  static constexpr int probability_bytes = 0;               ///< P in shared memory, per slot
  template <class C>
  using Main = KeyPassMain<C>;

  /// First key, in the block's tile, of a main warpgroup.
  __host__ __device__ static constexpr int group_key(int group) { return group * warpgroup_keys; }
};

/// Shared memory of a block.
template <class C>
struct KeyPassSmem {
  /// Rows of tiles, from when a tile is asked for to when its dQ is added: the producer is at most
  /// a ring of stages ahead of the main warpgroups, and they a ring of dS ahead of the dQ group.
  static constexpr int row_slots = 8;
  static_assert(2 * C::stages <= row_slots);
  static constexpr int key = 0;
  static constexpr int value = key + C::KeyTile::bytes;
  static constexpr int query = value + C::ValueTile::bytes;
  static constexpr int dout = query + C::stages * C::QueryTile::bytes;
  static constexpr int score = dout + C::stages * C::DoutTile::bytes;
  static constexpr int probability = score + C::stages * C::ScoreTile::bytes;
  static constexpr int gradient = probability + C::stages * C::probability_bytes;
  static constexpr int lse2 = gradient + C::gradient_slots * C::queries * C::d * 4;
  static constexpr int softmax_d = lse2 + C::stages * C::queries * 4;
  static constexpr int intervals = softmax_d + C::stages * C::queries * 4;
  static constexpr int facts = intervals + C::keys * 8;
  static constexpr int rows = facts + 64;
  static constexpr int barriers = rows + 8 * row_slots;
  static constexpr int bytes = barriers + 8 * (1 + 5 * C::stages + 2 * C::gradient_slots);
  static constexpr int alignment = 1024;
  static constexpr int allocated = bytes + alignment;  ///< dynamic memory is aligned by hand
  static_assert(query % 1024 == 0 && dout % 1024 == 0 && score % 1024 == 0);
  static_assert(barriers % 8 == 0);
  static_assert(allocated <= 232448, "227 KiB per block");
};

/// Barriers, by what their completion means.
template <class C>
struct KeyPassBarriers {
  std::uint64_t* keys_full;       ///< K, V loaded: producer's expect_tx -> mains, dQ group
  std::uint64_t* query_full;      ///< [stage] Q, LSE2 loaded -> mains
  std::uint64_t* dout_full;       ///< [stage] dO, D' loaded -> mains
  std::uint64_t* stage_empty;     ///< [stage] all readers are done with Q and dO -> producer
  std::uint64_t* score_full;      ///< [stage] the 8 main warps wrote dS -> dQ group
  std::uint64_t* score_empty;     ///< [stage] the warps of dQ have read dS -> mains
  std::uint64_t* gradient_full;   ///< [slot] the 4 product warps wrote dQ -> writers
  std::uint64_t* gradient_empty;  ///< [slot] the copy engine has read dQ -> product warpgroup

  __device__ explicit KeyPassBarriers(char* smem) {
    keys_full = reinterpret_cast<std::uint64_t*>(smem + KeyPassSmem<C>::barriers);
    query_full = keys_full + 1;
    dout_full = query_full + C::stages;
    stage_empty = dout_full + C::stages;
    score_full = stage_empty + C::stages;
    score_empty = score_full + C::stages;
    gradient_full = score_empty + C::stages;
    gradient_empty = gradient_full + C::gradient_slots;
  }

  __device__ void init() const {
    ptx::mbarrier_init(keys_full, 1);
    for (int i = 0; i < C::stages; ++i) {
      ptx::mbarrier_init(query_full + i, 1);
      ptx::mbarrier_init(dout_full + i, 1);
      ptx::mbarrier_init(stage_empty + i, C::releasing_warps);
      ptx::mbarrier_init(score_full + i, 8);
      ptx::mbarrier_init(score_empty + i, C::query_group ? 4 : 8);
    }
    for (int i = 0; i < C::gradient_slots; ++i) {
      ptx::mbarrier_init(gradient_full + i, 4);
      ptx::mbarrier_init(gradient_empty + i, 1);
    }
    ptx::mbarrier_init_fence();
  }
};

/// Which sequence, KV head and keys a block has, and which part of the group's query heads.
struct KeyPassPlace {
  int b, kv_head, split, tile, first_key;
  /// Order of the query tiles where the heads of a tile come together: every other section goes
  /// upwards. Then blocks of a KV head are at the same queries at any time under a causal mask, and
  /// what they share stays in L2: those that start together all begin with the last tile; they end
  /// in the order of their keys, and the blocks that follow begin where their keys do.
  bool ascending;

  __device__ KeyPassPlace(const BackwardArguments& p, unsigned block, int keys) {
    const BlockPlace place =
        place_block(block, p.batch * p.heads_kv * p.splits, p.tiles, p.section);
    split = place.pair % p.splits;
    kv_head = place.pair / p.splits % p.heads_kv;
    b = place.pair / p.splits / p.heads_kv;
    tile = place.tile;
    first_key = tile * keys;
    ascending = p.alternate && place.pair / p.section % 2 == 1;
  }
};

/// What a block works on.
struct KeyPassWork {
  KeyPassPlace place;
  SequencePair sequence;
  int first_head, heads;  ///< query heads
  TileRange tiles;        ///< query tiles of each head
  int iterations;         ///< heads * tiles

  __device__ KeyPassWork(const BackwardArguments& p, const KeyPassPlace& place_, int keys)
      : place(place_), sequence(p, place_.b) {
    const int first = place.split * p.heads_per_split;
    heads = min(p.heads_per_split, p.group - first);
    first_head = place.kv_head * p.group + first;
    tiles = query_tiles(p.mask, place.first_key, place.first_key + keys, sequence.queries.length,
                        sequence.keys.length);
    iterations = heads * (tiles.end - tiles.begin);
  }
};

/// What the main warpgroups need of the block, in shared memory: computing it takes more registers
/// than they have.
struct alignas(16) BlockFacts {
  TileRange tiles;   ///< query tiles of each head
  TileRange full;    ///< of them, those that need no mask
  TileRange before;  ///< query tiles that meet the keys of the block before
  int heads, step;   ///< step: 1 or -1, where the heads of a tile come together
  int iterations;    ///< tiles of all heads
};
static_assert(sizeof(BlockFacts) <= 64);

/// Walks over query heads and tiles in the order that all roles share: the tiles of one head after
/// the other, upwards or downwards. `heads_together`: all heads of a tile in turn, with the tiles
/// in the direction of KeyPassPlace::ascending, and each block from another head on, which keeps
/// their additions to dQ apart.
template <class C>
struct QueryWalk {
  TileRange tiles;
  int first_head, heads, turn = 0;  ///< turn: heads of this tile that are done
  int head, tile, step;
  std::int64_t row;         ///< of the tile in the row statistics and in the accumulator
  std::uint32_t head_step;  ///< in rows, from what is the last tile of a head to the next head's

  __device__ QueryWalk(const BackwardArguments& p, const KeyPassWork& work)
      : tiles(work.tiles),
        first_head(work.first_head),
        heads(work.heads),
        head(work.first_head),
        head_step(static_cast<std::uint32_t>(p.statistic_rows)) {
    bool upwards = !C::descending;
    if constexpr (C::heads_together) {
      head += work.place.tile % heads;
      upwards = work.place.ascending;
    } else {
      const int others = (tiles.end - 1 - tiles.begin) * backward_tile_queries;
      head_step += C::descending ? others : -others;
    }
    step = upwards ? 1 : -1;
    tile = upwards ? tiles.begin : tiles.end - 1;
    row = work.sequence.statistics(p, head) + tile * backward_tile_queries;
  }

  __device__ void advance() {
    if constexpr (C::heads_together) {
      row += head_step;
      if (++head == first_head + heads) {
        head = first_head;
        row -= static_cast<std::int64_t>(heads) * head_step;
      }
      if (++turn < heads) return;
      turn = 0;
      tile += step;
      row += step * backward_tile_queries;
    } else {
      tile += C::descending ? -1 : 1;
      if (C::descending ? tile >= tiles.begin : tile < tiles.end) {
        row += C::descending ? -backward_tile_queries : backward_tile_queries;
        return;
      }
      tile = C::descending ? tiles.end - 1 : tiles.begin;
      row += head_step;
      ++head;
    }
  }
};

/// The same walk as the main warpgroups see it.
template <class C>
struct TilePosition {
  int left;  ///< tiles that follow, over all heads
  int tile;  ///< query tile
  int turns = 0;
  RingPosition<C::stages> ring;

  __device__ __forceinline__ explicit TilePosition(const BlockFacts& facts)
      : left(facts.iterations - 1),
        tile(C::heads_together && facts.step < 0 ? facts.tiles.end - 1 : facts.tiles.begin) {}

  __device__ __forceinline__ bool masked(const BlockFacts& facts) const {
    const TileRange full = facts.full;
    return tile < full.begin || tile >= full.end;
  }

  __device__ __forceinline__ void advance(const BlockFacts& facts) {
    ring.advance();
    if constexpr (C::heads_together) {
      if (++turns < facts.heads) return;
      turns = 0;
      tile += facts.step;
    } else {
      const TileRange tiles = facts.tiles;
      if (++tile == tiles.end) tile = tiles.begin;
    }
  }
};

/// Where the producer leaves the row of a tile for the dQ group; `left`: tiles from this one on.
template <class C>
__device__ __forceinline__ volatile std::int64_t* tile_row(char* smem, int left) {
  using Smem = KeyPassSmem<C>;
  return reinterpret_cast<volatile std::int64_t*>(smem + Smem::rows) + left % Smem::row_slots;
}

/// Issues the copies of a block; one lane.
template <class C>
struct KeyPassProducer {
  using Smem = KeyPassSmem<C>;
  const BackwardArguments& p;
  const KeyPassWork& work;
  const KeyPassBarriers<C>& barriers;
  char* smem;
  TileSource query, dout;
  QueryWalk<C> walk;
  RingPosition<C::stages> ring;
  int left;  ///< tiles to load

  __device__ KeyPassProducer(const BackwardArguments& p_, const KeyPassWork& work_,
                             const KeyPassBarriers<C>& barriers_, char* smem_)
      : p(p_),
        work(work_),
        barriers(barriers_),
        smem(smem_),
        query(&p_.query, p_.rows_q, work_.sequence.queries, p_.packed_q ? 0 : work_.place.b,
              p_.head_dim),
        dout(&p_.dout, p_.rows_q, work_.sequence.queries, p_.packed_q ? 0 : work_.place.b,
             p_.has_dout ? p_.head_dim_v : 0),
        walk(p_, work_),
        left(work_.iterations) {}

  __device__ void load_keys() const {
    const KeyPassPlace& place = work.place;
    const int batch = p.packed_k ? 0 : place.b;
    const std::uint32_t base = ptx::shared_address(smem);
    const TileSource key(&p.key, p.rows_k, work.sequence.keys, batch, p.head_dim);
    const TileSource value(&p.value, p.rows_k, work.sequence.keys, batch, p.head_dim_v);
    using KeyTile = typename C::KeyTile;
    using ValueTile = typename C::ValueTile;
    const int row = place.first_key;
    ptx::mbarrier_arrive_expect_tx(
        barriers.keys_full,
        key.template bytes<KeyTile, C::keys>(row) + value.template bytes<ValueTile, C::keys>(row));
    key.template load<KeyTile, C::keys>(base + Smem::key, barriers.keys_full, row, place.kv_head);
    value.template load<ValueTile, C::keys>(base + Smem::value, barriers.keys_full, row,
                                            place.kv_head);
  }

  /// The next query tile, once the main warpgroups have left its stage.
  __device__ void load_tile() {
    ptx::mbarrier_wait(barriers.stage_empty + ring.slot, ring.phase ^ 1);  // <- release()
    *tile_row<C>(smem, left) = walk.row;
    const std::uint32_t base = ptx::shared_address(smem);
    const int row = walk.tile * C::queries;
    const int stage = ring.slot;
    constexpr int statistic_bytes = C::queries * 4;
    std::uint64_t* full = barriers.query_full + stage;
    ptx::mbarrier_arrive_expect_tx(
        full, query.template bytes<typename C::QueryTile, C::queries>(row) + statistic_bytes);
    query.template load<typename C::QueryTile, C::queries>(
        base + Smem::query + stage * C::QueryTile::bytes, full, row, walk.head);
    ptx::bulk_load(base + Smem::lse2 + stage * statistic_bytes, p.lse2 + walk.row, statistic_bytes,
                   full);
    full = barriers.dout_full + stage;
    ptx::mbarrier_arrive_expect_tx(
        full, dout.template bytes<typename C::DoutTile, C::queries>(row) + statistic_bytes);
    dout.template load<typename C::DoutTile, C::queries>(
        base + Smem::dout + stage * C::DoutTile::bytes, full, row, walk.head);
    ptx::bulk_load(base + Smem::softmax_d + stage * statistic_bytes, p.softmax_d + walk.row,
                   statistic_bytes, full);
    walk.advance();
    ring.advance();
    --left;
  }
};

/// dQ of one tile: dS K in pieces of dq_columns, each added to the accumulator when it is complete.
/// release() runs when the last product is.
template <class C, class Release>
__device__ __forceinline__ void add_query_gradients(char* smem, int slot, float* accumulator,
                                                    const Release& release) {
  using Smem = KeyPassSmem<C>;
  constexpr int columns = C::Tuning::dq_columns;
  constexpr int pieces = C::d / columns;
  const int thread = threadIdx.x % 128;
  const std::uint32_t address =
      ptx::shared_address(smem + Smem::score + slot * C::ScoreTile::bytes);
  constexpr bool by_query = C::score_major == ptx::Major::k;
  const std::uint64_t score = by_query ? descriptor::k_major(address)
                                       : descriptor::mn_major(address, C::ScoreTile::slab_bytes);
#pragma unroll
  for (int piece = 0; piece < pieces; ++piece) {
    constexpr int slab = C::KeyTile::slab_bytes;
    const int column = piece * columns;
    const std::uint64_t key = descriptor::mn_major(
        ptx::shared_address(smem + Smem::key + column / 64 * slab + column % 64 * 2), slab);
    float dq[columns / 2];
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < C::keys / 16; ++k) {
      const std::uint64_t step =
          by_query ? descriptor::k_step<C::ScoreTile::slab_bytes>(k) : k * descriptor::mn_step;
      ptx::wgmma_ss<typename C::T, columns, C::score_major, ptx::Major::mn>(
          dq, score + step, key + k * descriptor::mn_step, k != 0);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    if (piece == pieces - 1) release();
#pragma unroll
    for (int j = 0; j < columns / 8; ++j) {
      ptx::reduce_add(accumulator + ((column / 8 + j) * 128 + thread) * 4, dq[4 * j], dq[4 * j + 1],
                      dq[4 * j + 2], dq[4 * j + 3]);
    }
  }
}

/// The dQ warpgroup.
template <class C>
__device__ __forceinline__ void query_gradient_role(const BackwardArguments& p,
                                                    const KeyPassBarriers<C>& barriers,
                                                    char* smem) {
  int left = reinterpret_cast<const BlockFacts*>(smem + KeyPassSmem<C>::facts)->iterations;
  if (left == 0 || p.dq_accumulator == nullptr) return;
  RingPosition<C::stages> ring;
  ptx::mbarrier_wait(barriers.keys_full, 0);
  do {
    ptx::mbarrier_wait(barriers.score_full + ring.slot, ring.phase);  // <- publish
    const std::int64_t row = *tile_row<C>(smem, left);
    add_query_gradients<C>(smem, ring.slot, p.dq_accumulator + row * C::d, [&] {
      __syncwarp();
      if (ptx::elect_one()) ptx::mbarrier_arrive(barriers.score_empty + ring.slot);
    });
    ring.advance();
  } while (--left > 0);
}

}  // namespace sinkattn::hopper
