// SPDX-License-Identifier: Apache-2.0
#include "cpu/reference.h"

#include <cmath>
#include <limits>

#include "cpu/element.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"
#include "cpu/storage.h"

namespace sinkattn::cpu::reference {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr std::int64_t max_head_dim = 512;

const double* at(const HeadsTensor& tensor, std::int64_t offset) {
  return static_cast<const double*>(tensor.data) + offset;
}

double* at_mutable(const HeadsTensor& tensor, std::int64_t offset) {
  return static_cast<double*>(tensor.data) + offset;
}

double dot(const double* a, const double* b, std::int64_t n) {
  double sum = 0.0;
  for (std::int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

double sink_of(const AttentionShape& shape, std::int64_t head) {
  if (shape.sink.data == nullptr) return -infinity;
  return load_element(shape.sink.data, shape.sink.dtype, head * shape.sink.stride[0]);
}

double capped(double score, double softcap) {
  return softcap > 0.0 ? softcap * std::tanh(score / softcap) : score;
}

/// One query row: where it lies and which keys it sees.
struct Row {
  std::int64_t b, head, kv_head, i;
  std::int64_t storage_batch, storage_row;
  Range keys;
};

/// Calls function(row) for every (sequence, head, row) that takes part, in parallel.
template <class Function>
void for_each_row(const AttentionShape& shape, const ExecutionContext& context,
                  const Function& function) {
  const std::int64_t items = shape.batch * shape.heads_q;
  for_each_item(context, items, lanes_for(items), [&](int, std::int64_t item) {
    const std::int64_t b = item / shape.heads_q;
    const std::int64_t head = item % shape.heads_q;
    const SequenceInfo queries = resolve_sequence(shape.side_q, b);
    const std::int64_t sk = resolve_sequence(shape.side_k, b).length;
    for (std::int64_t i = 0; i < queries.length; ++i) {
      function(Row{b, head, head / shape.group, i, shape.packed_q ? 0 : b, queries.first_row + i,
                   visible_keys(shape.mask, i, queries.length, sk)});
    }
  });
}

}  // namespace

void forward(const ForwardProblem& p, const ExecutionContext& context) {
  const std::int64_t batch = storage_batch(p.packed_q, p.batch);
  zero_rows(p.out, batch, p.rows_q, p.heads_q, p.head_dim_v);
  fill_statistics(p.lse, batch, p.heads_q, p.rows_q, -infinity);
  for_each_row(p, context, [&](const Row& row) {
    const KeySequence sequence = key_sequence(p, p.keys, row.b);
    const double* q = at(p.query, p.query.offset(row.storage_batch, row.storage_row, row.head));
    const double* qv =
        p.query_v.data == nullptr
            ? nullptr
            : at(p.query_v, p.query_v.offset(row.storage_batch, row.storage_row, row.head));
    const auto value = [&](std::int64_t j) {
      return at(p.keys.value,
                slot_offset(p.keys, p.keys.value, sequence.row, sequence.first + j, row.kv_head));
    };
    const auto score = [&](std::int64_t j) {
      const double* k = at(p.keys.key, slot_offset(p.keys, p.keys.key, sequence.row,
                                                   sequence.first + j, row.kv_head));
      double s = dot(q, k, p.head_dim);
      if (qv != nullptr) s += dot(qv, value(j), p.head_dim_v);
      return capped(s * p.softmax_scale, p.softcap);
    };
    // The maximum over the visible scores and the sink; a NaN is dropped here and comes back
    // through the sum.
    const double sink = sink_of(p, row.head);
    double maximum = sink;
    for (std::int64_t j = row.keys.begin; j < row.keys.end; ++j) {
      const double s = score(j);
      if (s > maximum || std::isnan(maximum)) maximum = s;
    }
    const double shift = maximum == -infinity ? 0.0 : maximum;
    double sum = sink == maximum && sink != -infinity ? 1.0 : std::exp(sink - shift);
    double accumulated[max_head_dim] = {};
    for (std::int64_t j = row.keys.begin; j < row.keys.end; ++j) {
      const double weight = std::exp(score(j) - shift);
      sum += weight;
      const double* v = value(j);
      for (std::int64_t c = 0; c < p.head_dim_v; ++c) accumulated[c] += weight * v[c];
    }
    if (sum == 0.0) return;  // no key (or only scores of -inf) and no sink: 0 and -inf stand
    double* out = at_mutable(p.out, p.out.offset(row.storage_batch, row.storage_row, row.head));
    for (std::int64_t c = 0; c < p.head_dim_v; ++c) out[c] = accumulated[c] / sum;
    if (p.lse.data == nullptr) return;
    static_cast<double*>(p.lse.data)[p.lse.offset(row.storage_batch, row.head, row.storage_row)] =
        shift + std::log(sum);
  });
}

namespace {

double statistic(const RowsTensor& tensor, std::int64_t batch, std::int64_t head,
                 std::int64_t row) {
  return static_cast<const double*>(tensor.data)[tensor.offset(batch, head, row)];
}

/// D' in the workspace: (storage batch, head, row), contiguous.
RowsTensor workspace_d(const BackwardProblem& p, void* workspace) {
  return {workspace, DType::float64, p.heads_q * p.rows_q, p.rows_q, 1};
}

/// What P and dS of one (row, key) pair need.
struct PairGradient {
  double p;
  double ds;
};

PairGradient pair_gradient(const BackwardProblem& p, const double* q, const double* k,
                           const double* v, const double* dout, double lse, double d) {
  const double score = capped(dot(q, k, p.head_dim) * p.softmax_scale, p.softcap);
  // lse -inf: the row saw nothing; +inf: the sink took all of it. Otherwise the definition.
  const double weight = std::isinf(lse) ? 0.0 : std::exp(score - lse);
  const double dp = dout == nullptr ? 0.0 : dot(dout, v, p.head_dim_v);
  double ds = std::isinf(lse) ? 0.0 : weight * (dp - d);
  if (p.softcap > 0.0) {
    const double t = score / p.softcap;
    ds *= 1.0 - t * t;
  }
  return {weight, ds};
}

void query_gradients(const BackwardProblem& p, const RowsTensor& d_rows,
                     const ExecutionContext& context) {
  for_each_row(p, context, [&](const Row& row) {
    const SequenceInfo keys = resolve_sequence(p.side_k, row.b);
    const std::int64_t sb = row.storage_batch;
    const std::int64_t kb = p.packed_k ? 0 : row.b;
    const double* dout =
        p.dout.data == nullptr ? nullptr : at(p.dout, p.dout.offset(sb, row.storage_row, row.head));
    const double* out = at(p.out, p.out.offset(sb, row.storage_row, row.head));
    double d = dout == nullptr ? 0.0 : dot(dout, out, p.head_dim_v);
    if (p.dlse.data != nullptr) d -= statistic(p.dlse, sb, row.head, row.storage_row);
    static_cast<double*>(d_rows.data)[d_rows.offset(sb, row.head, row.storage_row)] = d;
    if (p.softmax_d.data != nullptr) {
      static_cast<double*>(p.softmax_d.data)[p.softmax_d.offset(sb, row.head, row.storage_row)] = d;
    }
    if (p.dq.data == nullptr) return;
    const double* q = at(p.query, p.query.offset(sb, row.storage_row, row.head));
    const double lse = statistic(p.lse, sb, row.head, row.storage_row);
    double* dq = at_mutable(p.dq, p.dq.offset(sb, row.storage_row, row.head));
    for (std::int64_t j = row.keys.begin; j < row.keys.end; ++j) {
      const double* k = at(p.key, p.key.offset(kb, keys.first_row + j, row.kv_head));
      const double* v = at(p.value, p.value.offset(kb, keys.first_row + j, row.kv_head));
      const double ds = pair_gradient(p, q, k, v, dout, lse, d).ds * p.softmax_scale;
      for (std::int64_t c = 0; c < p.head_dim; ++c) dq[c] += ds * k[c];
    }
  });
}

void key_gradients(const BackwardProblem& p, const RowsTensor& d_rows,
                   const ExecutionContext& context) {
  const std::int64_t items = p.batch * p.heads_kv;
  for_each_item(context, items, lanes_for(items), [&](int, std::int64_t item) {
    const std::int64_t b = item / p.heads_kv;
    const std::int64_t kv_head = item % p.heads_kv;
    const SequenceInfo queries = resolve_sequence(p.side_q, b);
    const SequenceInfo keys = resolve_sequence(p.side_k, b);
    const std::int64_t qb = p.packed_q ? 0 : b;
    const std::int64_t kb = p.packed_k ? 0 : b;
    for (std::int64_t j = 0; j < keys.length; ++j) {
      const std::int64_t key_row = keys.first_row + j;
      const double* k = at(p.key, p.key.offset(kb, key_row, kv_head));
      const double* v = at(p.value, p.value.offset(kb, key_row, kv_head));
      double* dk = at_mutable(p.dk, p.dk.offset(kb, key_row, kv_head));
      double* dv = at_mutable(p.dv, p.dv.offset(kb, key_row, kv_head));
      const Range rows = visible_queries(p.mask, j, queries.length, keys.length);
      for (std::int64_t head = kv_head * p.group; head < (kv_head + 1) * p.group; ++head) {
        for (std::int64_t i = rows.begin; i < rows.end; ++i) {
          const std::int64_t row = queries.first_row + i;
          const double* q = at(p.query, p.query.offset(qb, row, head));
          const double* dout =
              p.dout.data == nullptr ? nullptr : at(p.dout, p.dout.offset(qb, row, head));
          const PairGradient g = pair_gradient(p, q, k, v, dout, statistic(p.lse, qb, head, row),
                                               statistic(d_rows, qb, head, row));
          for (std::int64_t c = 0; c < p.head_dim; ++c) dk[c] += g.ds * p.softmax_scale * q[c];
          if (dout == nullptr) continue;
          for (std::int64_t c = 0; c < p.head_dim_v; ++c) dv[c] += g.p * dout[c];
        }
      }
    }
  });
}

void sink_gradients(const BackwardProblem& p, const RowsTensor& d_rows) {
  for (std::int64_t head = 0; head < p.heads_q; ++head) {
    const double sink = sink_of(p, head);
    double sum = 0.0;
    // A sink of -inf has no weight in any row; one of +inf makes every row constant.
    for (std::int64_t b = 0; b < p.batch && !std::isinf(sink); ++b) {
      const SequenceInfo queries = resolve_sequence(p.side_q, b);
      const std::int64_t qb = p.packed_q ? 0 : b;
      for (std::int64_t i = 0; i < queries.length; ++i) {
        const std::int64_t row = queries.first_row + i;
        const double lse = statistic(p.lse, qb, head, row);
        if (lse == -infinity) continue;  // the row saw nothing
        sum -= std::exp(sink - lse) * statistic(d_rows, qb, head, row);
      }
    }
    store_element(p.dsink.data, p.dsink.dtype, head * p.dsink.stride[0], sum);
  }
}

}  // namespace

std::size_t backward_workspace(const BackwardProblem& p) {
  return sizeof(double) *
         static_cast<std::size_t>(storage_batch(p.packed_q, p.batch) * p.heads_q * p.rows_q);
}

void backward(const BackwardProblem& p, const ExecutionContext& context) {
  const std::int64_t batch_q = storage_batch(p.packed_q, p.batch);
  const std::int64_t batch_k = storage_batch(p.packed_k, p.batch);
  zero_rows(p.dq, batch_q, p.rows_q, p.heads_q, p.head_dim);
  zero_rows(p.dk, batch_k, p.rows_k, p.heads_kv, p.head_dim);
  zero_rows(p.dv, batch_k, p.rows_k, p.heads_kv, p.head_dim_v);
  fill_statistics(p.softmax_d, batch_q, p.heads_q, p.rows_q, 0.0);
  const RowsTensor d_rows = workspace_d(p, context.workspace);
  query_gradients(p, d_rows, context);
  if (p.dk.data != nullptr) key_gradients(p, d_rows, context);
  if (p.dsink.data != nullptr) sink_gradients(p, d_rows);
}

}  // namespace sinkattn::cpu::reference
