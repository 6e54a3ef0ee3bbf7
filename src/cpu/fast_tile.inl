// SPDX-License-Identifier: Apache-2.0
// Tiles of queries and keys as fp32 blocks: loading, scores, masking. Part of fast_<isa>.cpp.
#include "common/schedule.h"
#include "cpu/block.h"
#include "cpu/fast.h"
#include "cpu/storage.h"

namespace sinkattn::cpu {
namespace {

constexpr float log2e = 0x1.71547652b82fep+0;
constexpr float ln2 = 0x1.62e42fefa39efp-1;
constexpr float minus_infinity = -std::numeric_limits<float>::infinity();

/// The rows of one query tile: `positions` x group, of sequence b and KV head.
struct QueryTile {
  const AttentionShape& shape;
  std::int64_t b, kv_head, position;
  std::int64_t storage_batch;
  std::int64_t first_row;
  std::int64_t sq, sk;
  std::int64_t rows;  ///< rows in use; 0: nothing to do

  QueryTile(const AttentionShape& s, std::int64_t b_, std::int64_t kv_head_, std::int64_t position_)
      : shape(s), b(b_), kv_head(kv_head_), position(position_) {
    const SequenceInfo queries = resolve_sequence(s.side_q, b);
    sq = queries.length;
    sk = resolve_sequence(s.side_k, b).length;
    storage_batch = s.packed_q ? 0 : b;
    first_row = queries.first_row;
    std::int64_t count = sq - position;
    if (count > positions_per_tile(s.group)) count = positions_per_tile(s.group);
    rows = count > 0 ? count * s.group : 0;
  }

  std::int64_t position_of(std::int64_t r) const { return position + r / shape.group; }
  std::int64_t storage_row(std::int64_t r) const { return first_row + position_of(r); }
  std::int64_t head(std::int64_t r) const { return kv_head * shape.group + r % shape.group; }
  Range keys_of(std::int64_t r) const { return visible_keys(shape.mask, position_of(r), sq, sk); }

  /// Keys that any row of the tile sees: row ends are monotone in the position.
  Range keys() const {
    Range range = keys_of(0);
    range.end = keys_of(rows - 1).end;
    return range;
  }

  KeyBlocks key_blocks_of(std::int64_t tile_n) const {
    return key_blocks(shape.mask, position, position_of(rows - 1) + 1, sq, sk, tile_n);
  }

  void load_rows(const HeadsTensor& tensor, std::int64_t dim, float* block, std::int64_t ld) const {
    for (std::int64_t r = 0; r < rows; ++r) {
      load_row(tensor.data, tensor.dtype, tensor.offset(storage_batch, storage_row(r), head(r)),
               dim, block + r * ld);
      for (std::int64_t c = dim; c < ld; ++c) block[r * ld + c] = 0.0f;
    }
  }
};

/// Block n of `tile` elements, cut to what is wanted of it: the first and the last block of a range
/// may be partial.
inline Range block_within(std::int64_t n, std::int64_t tile, const Range& wanted) {
  Range block{n * tile, (n + 1) * tile};
  if (block.begin < wanted.begin) block.begin = wanted.begin;
  if (block.end > wanted.end) block.end = wanted.end;
  return block;
}

/// Loads `count` key tokens from `first` of a tensor as rows of an fp32 block, zero-padded columns.
inline void load_keys(const KeyStorage& keys, const HeadsTensor& tensor,
                      const KeySequence& sequence, std::int64_t head, std::int64_t first,
                      std::int64_t count, std::int64_t dim, float factor, float* block,
                      std::int64_t ld) {
  for (std::int64_t t = 0; t < count; ++t) {
    float* row = block + t * ld;
    load_row(tensor.data, tensor.dtype,
             slot_offset(keys, tensor, sequence.row, sequence.first + first + t, head), dim, row);
    if (factor != 1.0f) {
      for (std::int64_t c = 0; c < dim; ++c) row[c] *= factor;
    }
    for (std::int64_t c = dim; c < ld; ++c) row[c] = 0.0f;
  }
}

/// Scores in log2 units: raw products times scale, soft-capped. Columns beyond `count` are not
/// used.
inline void scale_scores(float* scores, std::int64_t rows, std::int64_t ld, std::int64_t count,
                         float scale, float softcap) {
  for (std::int64_t r = 0; r < rows; ++r) {
    float* row = scores + r * ld;
    if (softcap > 0.0f) {
      for (std::int64_t j = 0; j < count; ++j) {
        row[j] = softcap * log2e * __builtin_tanhf(row[j] * scale / softcap);
      }
    } else {
      for (std::int64_t j = 0; j < ld; j += lanes) store(row + j, load(row + j) * (scale * log2e));
    }
  }
}

/// Removes what row r must not see from a block of keys [first, first + count) and pads to ld.
inline void mask_row(float* row, const Range& visible, std::int64_t first, std::int64_t count,
                     std::int64_t ld) {
  std::int64_t begin = visible.begin - first;
  std::int64_t end = visible.end - first;
  if (begin < 0) begin = 0;
  if (begin > count) begin = count;
  if (end > count) end = count;
  if (end < begin) end = begin;
  for (std::int64_t j = 0; j < begin; ++j) row[j] = minus_infinity;
  for (std::int64_t j = end; j < ld; ++j) row[j] = minus_infinity;
}

inline float sink_of(const AttentionShape& shape, std::int64_t head) {
  if (shape.sink.data == nullptr) return minus_infinity;
  return static_cast<float>(
      load_element(shape.sink.data, shape.sink.dtype, head * shape.sink.stride[0]));
}

}  // namespace
}  // namespace sinkattn::cpu
