// SPDX-License-Identifier: Apache-2.0
// Backward in two passes that share nothing but D': dq over query tiles, dk and dv over key tiles.
// Seven products instead of five, but no accumulator outside the tile, no atomics, and the same
// bits for any number of threads. Part of fast_<isa>.cpp.

namespace sinkattn::cpu {
namespace {

struct BackwardBlocks {
  std::int64_t d, dv;
  float *query, *dout, *key, *key_t, *value, *value_t, *p, *ds, *dq, *dk, *dv_out, *lse, *delta;
  std::int64_t bytes;

  BackwardBlocks(const BackwardProblem& problem, void* memory) {
    Arena arena(memory);
    const std::int64_t m = positions_per_tile(problem.group) * problem.group;
    const std::int64_t n = fast_tile_keys;
    d = padded(problem.head_dim);
    dv = padded(problem.head_dim_v);
    query = arena.floats(m * d);
    dout = arena.floats(m * dv);
    key = arena.floats(n * d);
    key_t = arena.floats(d * n);
    value = arena.floats(n * dv);
    value_t = arena.floats(dv * n);
    p = arena.floats(m * n);
    ds = arena.floats(m * n);
    dq = arena.floats(m * d);
    dk = arena.floats(n * d);
    dv_out = arena.floats(n * dv);
    lse = arena.floats(m);
    delta = arena.floats(m);
    bytes = arena.used();
  }
};

std::int64_t backward_lane_bytes(const BackwardProblem& p) {
  return BackwardBlocks(p, nullptr).bytes;
}

inline std::int64_t statistic_index(const BackwardProblem& p, const QueryTile& tile,
                                    std::int64_t r) {
  return (tile.storage_batch * p.heads_q + tile.head(r)) * p.rows_q + tile.storage_row(r);
}

void prepare_tile(const BackwardProblem& p, float* d_rows, const BackwardTile& work, void* lane) {
  const QueryTile tile(p, work.b, work.kv_head, work.start);
  const BackwardBlocks blocks(p, lane);
  for (std::int64_t r = 0; r < tile.rows; ++r) {
    const std::int64_t row = tile.storage_row(r);
    const std::int64_t head = tile.head(r);
    float d = 0.0f;
    if (p.dout.data != nullptr) {
      float* dout = blocks.dout;
      float* out = blocks.dout + blocks.dv;
      load_row(p.dout.data, p.dout.dtype, p.dout.offset(tile.storage_batch, row, head),
               p.head_dim_v, dout);
      load_row(p.out.data, p.out.dtype, p.out.offset(tile.storage_batch, row, head), p.head_dim_v,
               out);
      for (std::int64_t c = 0; c < p.head_dim_v; ++c) d += dout[c] * out[c];
    }
    if (p.dlse.data != nullptr) {
      d -= static_cast<const float*>(p.dlse.data)[p.dlse.offset(tile.storage_batch, head, row)];
    }
    d_rows[statistic_index(p, tile, r)] = d;
    if (p.softmax_d.data != nullptr) {
      static_cast<float*>(p.softmax_d.data)[p.softmax_d.offset(tile.storage_batch, head, row)] = d;
    }
  }
}

/// Queries, dout, LSE (log2 units) and D' of a tile.
inline void load_query_side(const BackwardProblem& p, const QueryTile& tile, const float* d_rows,
                            const BackwardBlocks& blocks) {
  tile.load_rows(p.query, p.head_dim, blocks.query, blocks.d);
  if (p.dout.data != nullptr) {
    tile.load_rows(p.dout, p.head_dim_v, blocks.dout, blocks.dv);
  } else {
    zero(blocks.dout, tile.rows * blocks.dv);
  }
  for (std::int64_t r = 0; r < tile.rows; ++r) {
    blocks.lse[r] =
        log2e *
        static_cast<const float*>(
            p.lse.data)[p.lse.offset(tile.storage_batch, tile.head(r), tile.storage_row(r))];
    blocks.delta[r] = d_rows[statistic_index(p, tile, r)];
  }
}

inline void load_key_side(const BackwardProblem& p, const KeyStorage& keys,
                          const KeySequence& sequence, std::int64_t kv_head, std::int64_t first,
                          std::int64_t count, const BackwardBlocks& blocks) {
  load_keys(keys, keys.key, sequence, kv_head, first, count, p.head_dim, 1.0f, blocks.key,
            blocks.d);
  load_keys(keys, keys.value, sequence, kv_head, first, count, p.head_dim_v, 1.0f, blocks.value,
            blocks.dv);
  transpose(blocks.key, blocks.d, count, p.head_dim, blocks.key_t, fast_tile_keys);
  transpose(blocks.value, blocks.dv, count, p.head_dim_v, blocks.value_t, fast_tile_keys);
}

/// P and dS of a tile of rows against a block of keys, in blocks.p and blocks.ds.
inline void weights(const BackwardProblem& p, const QueryTile& tile, std::int64_t first,
                    std::int64_t count, const BackwardBlocks& blocks) {
  const std::int64_t n = fast_tile_keys;
  const std::int64_t columns = padded(count);
  const float softcap = static_cast<float>(p.softcap);
  product(tile.rows, columns, p.head_dim, {blocks.query, blocks.d, 1}, blocks.key_t, n, blocks.p, n,
          false);
  product(tile.rows, columns, p.head_dim_v, {blocks.dout, blocks.dv, 1}, blocks.value_t, n,
          blocks.ds, n, false);
  scale_scores(blocks.p, tile.rows, n, columns, static_cast<float>(p.softmax_scale), softcap);
  for (std::int64_t r = 0; r < tile.rows; ++r) {
    float* weight = blocks.p + r * n;
    float* ds = blocks.ds + r * n;
    const Range visible = tile.keys_of(r);
    std::int64_t begin = visible.begin - first;
    std::int64_t end = visible.end - first;
    begin = begin < 0 ? 0 : (begin > columns ? columns : begin);
    end = end > count ? count : (end < begin ? begin : end);
    const float lse = blocks.lse[r];
    // LSE -inf: the row saw nothing; +inf: its sink took everything. Either way no key has weight.
    if (std::isinf(lse)) end = begin;
    const float delta = blocks.delta[r];
    if (softcap > 0.0f) {
      for (std::int64_t j = begin; j < end; ++j) {
        const float t = weight[j] * ln2 / softcap;
        ds[j] = (ds[j] - delta) * (1.0f - t * t);
      }
    } else {
      for (std::int64_t j = 0; j < columns; j += lanes) store(ds + j, load(ds + j) - delta);
    }
    if (begin == 0 && end == columns) {
      for (std::int64_t j = 0; j < columns; j += lanes) {
        const Vector x = exp2_vector(load(weight + j) - lse);
        store(weight + j, x);
        store(ds + j, load(ds + j) * x);
      }
      continue;
    }
    // Removed pairs are selected away, never multiplied by zero.
    mask_row(weight, {first + begin, first + end}, first, count, columns);
    const float shift = std::isinf(lse) ? 0.0f : lse;
    for (std::int64_t j = 0; j < columns; j += lanes) {
      const Vector x = load(weight + j);
      const IntVector removed = x == broadcast(minus_infinity);
      const Vector y = exp2_vector(x - shift);
      store(weight + j, removed ? Vector{} : y);
      store(ds + j, removed ? Vector{} : load(ds + j) * y);
    }
  }
}

inline KeyStorage key_storage_of(const BackwardProblem& p) {
  KeyStorage keys;
  keys.key = p.key;
  keys.value = p.value;
  keys.cache_rows = p.batch;
  return keys;
}

void query_tile(const BackwardProblem& p, const float* d_rows, const BackwardTile& work,
                void* lane) {
  const QueryTile tile(p, work.b, work.kv_head, work.start);
  if (tile.rows == 0) return;
  const BackwardBlocks blocks(p, lane);
  const KeyStorage keys = key_storage_of(p);
  const KeySequence sequence = key_sequence(p, keys, work.b);
  load_query_side(p, tile, d_rows, blocks);
  zero(blocks.dq, tile.rows * blocks.d);
  const Range range = tile.keys();
  const KeyBlocks key_range = tile.key_blocks_of(fast_tile_keys);
  for (std::int64_t n = key_range.n_begin; n < key_range.n_end; ++n) {
    const Range block = block_within(n, fast_tile_keys, range);
    const std::int64_t first = block.begin;
    const std::int64_t count = block.size();
    load_key_side(p, keys, sequence, work.kv_head, first, count, blocks);
    weights(p, tile, first, count, blocks);
    product(tile.rows, blocks.d, count, {blocks.ds, fast_tile_keys, 1}, blocks.key, blocks.d,
            blocks.dq, blocks.d, true);
  }
  for (std::int64_t r = 0; r < tile.rows; ++r) {
    store_row(p.dq.data, p.dq.dtype,
              p.dq.offset(tile.storage_batch, tile.storage_row(r), tile.head(r)), p.head_dim,
              blocks.dq + r * blocks.d, static_cast<float>(p.softmax_scale));
  }
}

void key_tile(const BackwardProblem& p, const float* d_rows, const BackwardTile& work, void* lane) {
  const SequenceInfo queries = resolve_sequence(p.side_q, work.b);
  const KeyStorage keys = key_storage_of(p);
  const KeySequence sequence = key_sequence(p, keys, work.b);
  const std::int64_t first = work.start;
  if (first >= sequence.length) return;
  const std::int64_t count =
      sequence.length - first < fast_tile_keys ? sequence.length - first : fast_tile_keys;
  const BackwardBlocks blocks(p, lane);
  load_key_side(p, keys, sequence, work.kv_head, first, count, blocks);
  zero(blocks.dk, count * blocks.d);
  zero(blocks.dv_out, count * blocks.dv);
  const std::int64_t step = positions_per_tile(p.group);
  const QueryBlocks rows =
      query_blocks(p.mask, first, first + count, queries.length, sequence.length, step);
  for (std::int64_t m = rows.m_begin; m < rows.m_end; ++m) {
    const QueryTile tile(p, work.b, work.kv_head, m * step);
    load_query_side(p, tile, d_rows, blocks);
    weights(p, tile, first, count, blocks);
    product(count, blocks.dv, tile.rows, {blocks.p, 1, fast_tile_keys}, blocks.dout, blocks.dv,
            blocks.dv_out, blocks.dv, true);
    product(count, blocks.d, tile.rows, {blocks.ds, 1, fast_tile_keys}, blocks.query, blocks.d,
            blocks.dk, blocks.d, true);
  }
  const std::int64_t batch = p.packed_k ? 0 : work.b;
  for (std::int64_t t = 0; t < count; ++t) {
    const std::int64_t row = sequence.first + first + t;
    store_row(p.dk.data, p.dk.dtype, p.dk.offset(batch, row, work.kv_head), p.head_dim,
              blocks.dk + t * blocks.d, static_cast<float>(p.softmax_scale));
    store_row(p.dv.data, p.dv.dtype, p.dv.offset(batch, row, work.kv_head), p.head_dim_v,
              blocks.dv_out + t * blocks.dv, 1.0f);
  }
}

}  // namespace
}  // namespace sinkattn::cpu
