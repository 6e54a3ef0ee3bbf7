// SPDX-License-Identifier: Apache-2.0
// Appending to a KV cache: new keys and values go to their slots, keys and queries are rotated.
#include <cstdio>
#include <cstring>

#include "common/backend.h"
#include "cpu/element.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"
#include "cpu/storage.h"

namespace sinkattn::cpu {
namespace {

constexpr std::int64_t max_head_dim = 256;

/// Rotates one head vector at `position` (clamped to the table): pairs (x, y) become
/// (x cos - y sin, x sin + y cos), in fp32 (fp64 for float64), rounded once.
void rotate(const AppendProblem& p, const void* from, std::int64_t from_offset, void* to,
            std::int64_t to_offset, DType dtype, std::int64_t position) {
  double x[max_head_dim];
  double y[max_head_dim];
  load_row(from, dtype, from_offset, p.head_dim, x);
  for (std::int64_t c = 0; c < p.head_dim; ++c) y[c] = x[c];
  const std::int64_t row = clamp_index(position, 0, p.rotary_positions - 1) * p.rotary_stride;
  const std::int64_t half = p.rotary_dim / 2;
  for (std::int64_t c = 0; c < half; ++c) {
    const double cosine = load_element(p.rotary_cos, dtype, row + c);
    const double sine = load_element(p.rotary_sin, dtype, row + c);
    const std::int64_t first = p.rotary_interleaved ? 2 * c : c;
    const std::int64_t second = p.rotary_interleaved ? 2 * c + 1 : c + half;
    y[first] = x[first] * cosine - x[second] * sine;
    y[second] = x[first] * sine + x[second] * cosine;
  }
  store_row(to, dtype, to_offset, p.head_dim, y, 1.0);
}

void copy_elements(const HeadsTensor& from, std::int64_t from_offset, const HeadsTensor& to,
                   std::int64_t to_offset, std::int64_t n) {
  const std::int64_t size = dtype_size(from.dtype);
  std::memcpy(static_cast<char*>(to.data) + to_offset * size,
              static_cast<const char*>(from.data) + from_offset * size,
              static_cast<std::size_t>(n * size));
}

std::int64_t rotary_offset(const AppendProblem& p, std::int64_t b, std::int64_t used) {
  return p.rotary_seqlens == nullptr ? used : p.rotary_seqlens[b];
}

void append_keys(const AppendProblem& p, std::int64_t b) {
  const std::int64_t used = clamp_index(p.cache_seqlens[b], 0, p.capacity);
  const SequenceInfo tokens = resolve_sequence(p.side_new, b);
  const std::int64_t batch = p.side_new.cu_seqlens != nullptr ? 0 : b;
  const std::int64_t row = p.cache.cache_row(b);
  const std::int64_t offset = rotary_offset(p, b, used);
  // Writes past the capacity are dropped.
  const std::int64_t count = tokens.length < p.capacity - used ? tokens.length : p.capacity - used;
  for (std::int64_t t = 0; t < count; ++t) {
    for (std::int64_t head = 0; head < p.heads_kv; ++head) {
      const std::int64_t from_k = p.key_new.offset(batch, tokens.first_row + t, head);
      const std::int64_t to_k = slot_offset(p.cache, p.cache.key, row, used + t, head);
      if (p.rotary_dim > 0) {
        rotate(p, p.key_new.data, from_k, p.cache.key.data, to_k, p.key_new.dtype, offset + t);
      } else {
        copy_elements(p.key_new, from_k, p.cache.key, to_k, p.head_dim);
      }
      copy_elements(p.value_new, p.value_new.offset(batch, tokens.first_row + t, head),
                    p.cache.value, slot_offset(p.cache, p.cache.value, row, used + t, head),
                    p.head_dim_v);
    }
  }
  if (p.seqused_after != nullptr) p.seqused_after[b] = static_cast<std::int32_t>(used + count);
}

void rotate_queries(const AppendProblem& p, std::int64_t b) {
  const std::int64_t used = clamp_index(p.cache_seqlens[b], 0, p.capacity);
  const SequenceInfo queries = resolve_sequence(p.side_q, b);
  const std::int64_t batch = p.packed_q ? 0 : b;
  const std::int64_t offset = rotary_offset(p, b, used);
  for (std::int64_t i = 0; i < queries.length; ++i) {
    const std::int64_t row = queries.first_row + i;
    const std::int64_t position = offset + (p.rotate_queries_by_position ? i : 0);
    for (std::int64_t head = 0; head < p.heads_q; ++head) {
      rotate(p, p.query.data, p.query.offset(batch, row, head), p.query_rotated.data,
             p.query_rotated.offset(batch, row, head), p.query.dtype, position);
    }
  }
}

}  // namespace

Status plan_append_kv(const AppendProblem& p, Plan* plan) {
  plan->backend = Backend::cpu;
  if (p.head_dim > max_head_dim) {
    return Status::error(StatusCode::value_error, "k_cache: expected a head dim <= 256, got %lld",
                         static_cast<long long>(p.head_dim));
  }
  std::snprintf(plan->kernel, sizeof(plan->kernel), "cpu_append_kv");
  std::snprintf(plan->reason, sizeof(plan->reason), "%s",
                p.rotary_dim > 0 ? "rotates keys and queries" : "copies");
  return {};
}

Status append_kv(const AppendProblem& p, const Plan&, const ExecutionContext& context) {
  if (p.rotary_dim > 0) {
    zero_rows(p.query_rotated, storage_batch(p.packed_q, p.batch), p.rows_q, p.heads_q, p.head_dim);
  }
  for_each_item(context, p.batch, lanes_for(p.batch), [&](int, std::int64_t b) {
    append_keys(p, b);
    if (p.rotary_dim > 0) rotate_queries(p, b);
  });
  return {};
}

}  // namespace sinkattn::cpu
