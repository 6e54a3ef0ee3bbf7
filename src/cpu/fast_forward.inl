// SPDX-License-Identifier: Apache-2.0
// Forward of one query tile: online softmax over key blocks, the sink at the end. Part of
// fast_<isa>.cpp.
#include <cmath>

namespace sinkattn::cpu {
namespace {

/// Blocks of one lane. Leading dimensions are whole vectors.
struct ForwardBlocks {
  std::int64_t d, dv;  ///< padded head dims
  float *query, *query_v, *key, *key_t, *value, *value_t, *scores, *out, *maximum, *sum;
  std::int64_t bytes;

  ForwardBlocks(const ForwardProblem& p, void* memory) {
    Arena arena(memory);
    const std::int64_t m = positions_per_tile(p.group) * p.group;
    const std::int64_t n = fast_tile_keys;
    d = padded(p.head_dim);
    dv = padded(p.head_dim_v);
    query = arena.floats(m * d);
    query_v = arena.floats(p.query_v.data != nullptr ? m * dv : 0);
    key = arena.floats(n * d);
    key_t = arena.floats(d * n);
    value = arena.floats(n * dv);
    value_t = arena.floats(p.query_v.data != nullptr ? dv * n : 0);
    scores = arena.floats(m * n);
    out = arena.floats(m * dv);
    maximum = arena.floats(m);
    sum = arena.floats(m);
    bytes = arena.used();
  }
};

inline float descale(const VectorView& view, std::int64_t b, std::int64_t kv_head) {
  if (view.data == nullptr) return 1.0f;
  return static_cast<const float*>(view.data)[b * view.stride[0] + kv_head * view.stride[1]];
}

inline float horizontal_max(const float* row, std::int64_t n) {
  Vector best = load(row);
  for (std::int64_t j = lanes; j < n; j += lanes) {
    const Vector x = load(row + j);
    best = x > best ? x : best;  // false for NaN: a NaN score comes back through the sum
  }
  float result = minus_infinity;
  for (int i = 0; i < lanes; ++i) result = best[i] > result ? best[i] : result;
  return result;
}

/// One row of scores -> weights; updates running maximum and sum, rescales the accumulator.
inline void softmax_row(float* row, std::int64_t n, float* maximum, float* sum, float* out,
                        std::int64_t dv) {
  const float previous = *maximum;
  const float block_max = horizontal_max(row, n);
  const float next = block_max > previous ? block_max : previous;
  const float shift = next == minus_infinity ? 0.0f : next;
  Vector total{};
  for (std::int64_t j = 0; j < n; j += lanes) {
    const Vector weight = exp2_vector(load(row + j) - shift);
    store(row + j, weight);
    total += weight;
  }
  float added = 0.0f;
  for (int i = 0; i < lanes; ++i) added += total[i];
  if (next != previous) {
    const float factor = previous == minus_infinity ? 0.0f : std::exp2(previous - next);
    *sum *= factor;
    for (std::int64_t c = 0; c < dv; c += lanes) store(out + c, load(out + c) * factor);
    *maximum = next;
  }
  *sum += added;
}

/// Result of a row from its running state (log2 units) and its sink: docs/math.md, "finalize".
struct Finalized {
  float factor;  ///< multiplies the accumulator
  float lse;
  bool empty;  ///< no key and no sink: out 0
};

inline Finalized finalize(float maximum, float sum, float sink) {
  if (std::isnan(sink) || std::isnan(sum)) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    return {nan, nan, false};
  }
  // A row without a key (or with scores of -inf alone): the sink decides.
  if (maximum == minus_infinity || sum == 0.0f) return {0.0f, sink, true};
  const float sink2 = sink * log2e;
  // +inf, or finite and beyond fp32 in log2 units: no key has any weight beside it.
  if (std::isinf(sink2) && sink2 > 0.0f) return {0.0f, sink, false};
  const float top = sink2 > maximum ? sink2 : maximum;
  const float own = std::exp2(maximum - top);
  const float total = sum * own + (sink2 == minus_infinity ? 0.0f : std::exp2(sink2 - top));
  return {own / total, ln2 * (top + std::log2(total)), false};
}

inline void forward_block(const ForwardProblem& p, const QueryTile& tile,
                          const ForwardBlocks& blocks, const KeySequence& sequence,
                          std::int64_t first, std::int64_t count, float scale, bool masked,
                          float value_factor) {
  const std::int64_t n = fast_tile_keys;
  const std::int64_t columns = padded(count);
  load_keys(p.keys, p.keys.key, sequence, tile.kv_head, first, count, p.head_dim, 1.0f, blocks.key,
            blocks.d);
  transpose(blocks.key, blocks.d, count, p.head_dim, blocks.key_t, n);
  load_keys(p.keys, p.keys.value, sequence, tile.kv_head, first, count, p.head_dim_v, value_factor,
            blocks.value, blocks.dv);
  product(tile.rows, columns, p.head_dim, {blocks.query, blocks.d, 1}, blocks.key_t, n,
          blocks.scores, n, false);
  if (p.query_v.data != nullptr) {
    transpose(blocks.value, blocks.dv, count, p.head_dim_v, blocks.value_t, n);
    product(tile.rows, columns, p.head_dim_v, {blocks.query_v, blocks.dv, 1}, blocks.value_t, n,
            blocks.scores, n, true);
  }
  scale_scores(blocks.scores, tile.rows, n, columns, scale, static_cast<float>(p.softcap));
  for (std::int64_t r = 0; r < tile.rows; ++r) {
    float* row = blocks.scores + r * n;
    if (masked || columns != count) mask_row(row, tile.keys_of(r), first, count, columns);
    softmax_row(row, columns, blocks.maximum + r, blocks.sum + r, blocks.out + r * blocks.dv,
                blocks.dv);
  }
  product(tile.rows, blocks.dv, count, {blocks.scores, n, 1}, blocks.value, blocks.dv, blocks.out,
          blocks.dv, true);
}

inline void store_partial(const ForwardProblem& p, const QueryTile& tile,
                          const ForwardBlocks& blocks, const Partials& partials, int split) {
  const std::int64_t batch = p.packed_q ? 1 : p.batch;
  for (std::int64_t r = 0; r < tile.rows; ++r) {
    const std::int64_t index =
        ((split * batch + tile.storage_batch) * p.rows_q + tile.storage_row(r)) * p.heads_q +
        tile.head(r);
    const Finalized result = finalize(blocks.maximum[r], blocks.sum[r], minus_infinity);
    partials.lse[index] = result.lse;
    for (std::int64_t c = 0; c < p.head_dim_v; ++c) {
      const float x = blocks.out[r * blocks.dv + c];
      partials.out[index * p.head_dim_v + c] = result.empty ? 0.0f : x * result.factor;
    }
  }
}

inline void store_result(const ForwardProblem& p, const QueryTile& tile,
                         const ForwardBlocks& blocks) {
  for (std::int64_t r = 0; r < tile.rows; ++r) {
    const Finalized result = finalize(blocks.maximum[r], blocks.sum[r], sink_of(p, tile.head(r)));
    float* row = blocks.out + r * blocks.dv;
    if (result.empty) zero(row, p.head_dim_v);
    store_row(p.out.data, p.out.dtype,
              p.out.offset(tile.storage_batch, tile.storage_row(r), tile.head(r)), p.head_dim_v,
              row, result.empty ? 1.0f : result.factor);
    if (p.lse.data == nullptr) continue;
    static_cast<float*>(
        p.lse.data)[p.lse.offset(tile.storage_batch, tile.head(r), tile.storage_row(r))] =
        result.lse;
  }
}

std::int64_t forward_lane_bytes(const ForwardProblem& p) { return ForwardBlocks(p, nullptr).bytes; }

void forward_tile(const ForwardProblem& p, int splits, const Partials& partials,
                  const ForwardTile& work, void* lane) {
  const QueryTile tile(p, work.b, work.kv_head, work.position);
  if (tile.rows == 0) return;
  const ForwardBlocks blocks(p, lane);
  tile.load_rows(p.query, p.head_dim, blocks.query, blocks.d);
  if (p.query_v.data != nullptr) {
    tile.load_rows(p.query_v, p.head_dim_v, blocks.query_v, blocks.dv);
  }
  zero(blocks.out, tile.rows * blocks.dv);
  for (std::int64_t r = 0; r < tile.rows; ++r) {
    blocks.maximum[r] = minus_infinity;
    blocks.sum[r] = 0.0f;
  }
  const float scale = static_cast<float>(p.softmax_scale) *
                      descale(p.q_descale, work.b, work.kv_head) *
                      descale(p.k_descale, work.b, work.kv_head);
  const float value_factor = descale(p.v_descale, work.b, work.kv_head);
  const KeySequence sequence = key_sequence(p, p.keys, work.b);
  const Range keys = tile.keys();
  const KeyBlocks key_range = tile.key_blocks_of(fast_tile_keys);
  const Range part = split_blocks({key_range.n_begin, key_range.n_end}, work.split, splits);
  for (std::int64_t n = part.begin; n < part.end; ++n) {
    const Range block = block_within(n, fast_tile_keys, keys);
    const bool masked = n < key_range.n_full_begin || n >= key_range.n_full_end;
    forward_block(p, tile, blocks, sequence, block.begin, block.size(), scale, masked,
                  value_factor);
  }
  if (splits > 1) {
    store_partial(p, tile, blocks, partials, work.split);
  } else {
    store_result(p, tile, blocks);
  }
}

}  // namespace
}  // namespace sinkattn::cpu
