// SPDX-License-Identifier: Apache-2.0
#include "common/check.h"

#include <cinttypes>

#include "common/check_detail.h"
#include "sinkattn/attention.h"

namespace sinkattn {
namespace {

DType output_dtype(DType query) { return query == DType::float8_e4m3 ? DType::bfloat16 : query; }

/// A tensor shaped like `like` but for its last dimension.
Status like(const TensorView& tensor, const char* name, const TensorView& like, std::int64_t last,
            DType type) {
  SINKATTN_RETURN_IF_ERROR(check::same_device(tensor, name, like.device));
  SINKATTN_RETURN_IF_ERROR(check::dtype(tensor, name, type));
  SINKATTN_RETURN_IF_ERROR(check::rank(tensor, name, like.rank));
  for (int i = 0; i < like.rank - 1; ++i) {
    SINKATTN_RETURN_IF_ERROR(check::size(tensor, name, i, like.shape[i]));
  }
  SINKATTN_RETURN_IF_ERROR(check::size(tensor, name, like.rank - 1, last));
  return check::data_layout(tensor, name);
}

Status check_query_v(const ForwardParams& p, const AttentionShape& shape) {
  if (!p.query_v.defined()) return {};
  if (p.query.dtype == DType::float8_e4m3) {
    return Status::error(StatusCode::type_error, "qv: expected a 16-bit q, got float8_e4m3");
  }
  SINKATTN_RETURN_IF_ERROR(like(p.query_v, "qv", p.query, shape.head_dim_v, p.query.dtype));
  if (shape.head_dim <= 64 && shape.head_dim_v >= 256) return {};
  return Status::error(StatusCode::value_error,
                       "qv: expected a q head dim <= 64 and a v head dim >= 256, got %" PRId64
                       " and %" PRId64,
                       shape.head_dim, shape.head_dim_v);
}

Status check_descale(const TensorView& scale, const char* name, const TensorView& query,
                     const AttentionShape& shape) {
  if (!scale.defined()) return {};
  if (query.dtype != DType::float8_e4m3) {
    return Status::error(StatusCode::value_error,
                         "%s: expected none unless q is float8_e4m3, got "
                         "one with %s",
                         name, dtype_name(query.dtype));
  }
  SINKATTN_RETURN_IF_ERROR(check::same_device(scale, name, query.device));
  SINKATTN_RETURN_IF_ERROR(check::dtype(scale, name, DType::float32));
  SINKATTN_RETURN_IF_ERROR(check::rank(scale, name, 2));
  SINKATTN_RETURN_IF_ERROR(check::size(scale, name, 0, shape.batch));
  return check::size(scale, name, 1, shape.heads_kv);
}

Status check_splits(const ForwardParams& p, const AttentionShape& shape) {
  if (p.num_splits < 0 || p.num_splits > 256) {
    return Status::error(StatusCode::value_error,
                         "num_splits: expected an integer in [0, 256], got %d", p.num_splits);
  }
  return check::index_vector(p.scheduler_metadata, "scheduler_metadata",
                             schedule_length(shape.batch), p.query.device);
}

}  // namespace

Status make_forward_problem(const ForwardParams& p, ForwardProblem* problem) {
  *problem = {};
  SINKATTN_RETURN_IF_ERROR(
      check::shared({p.query, p.key, p.value, p.cu_seqlens_q, p.cu_seqlens_k, p.seqused_q,
                     p.seqused_k, p.max_seqlen_q, p.max_seqlen_k, p.page_table, p.cache_batch_idx,
                     p.cache_leftpad, p.learnable_sink, p.softmax_scale, p.mask, p.softcap,
                     p.sm_margin, true, p.query_v.defined()},
                    problem));
  const Device device = p.query.device;
  SINKATTN_RETURN_IF_ERROR(check::key_storage(p.key, p.value, p.page_table, p.cache_batch_idx,
                                              problem->batch, problem->packed_k, device,
                                              &problem->keys));
  if (p.page_table.defined() && !p.seqused_k.defined()) {
    return Status::error(StatusCode::value_error,
                         "page_table: expected seqused_k or cache_seqlens with it, got neither");
  }
  SINKATTN_RETURN_IF_ERROR(check_query_v(p, *problem));
  SINKATTN_RETURN_IF_ERROR(check_descale(p.q_descale, "q_descale", p.query, *problem));
  SINKATTN_RETURN_IF_ERROR(check_descale(p.k_descale, "k_descale", p.query, *problem));
  SINKATTN_RETURN_IF_ERROR(check_descale(p.v_descale, "v_descale", p.query, *problem));
  SINKATTN_RETURN_IF_ERROR(check_splits(p, *problem));
  SINKATTN_RETURN_IF_ERROR(check::defined(p.out, "out"));
  SINKATTN_RETURN_IF_ERROR(
      like(p.out, "out", p.query, problem->head_dim_v, output_dtype(p.query.dtype)));
  SINKATTN_RETURN_IF_ERROR(
      check::statistics(p.softmax_lse, "softmax_lse", *problem, p.query.dtype, device));
  problem->query = check::heads_tensor(p.query, problem->packed_q);
  problem->query_v = check::heads_tensor(p.query_v, problem->packed_q);
  problem->out = check::heads_tensor(p.out, problem->packed_q);
  problem->lse = check::rows_tensor(p.softmax_lse, problem->packed_q);
  problem->q_descale = check::vector_view(p.q_descale);
  problem->k_descale = check::vector_view(p.k_descale);
  problem->v_descale = check::vector_view(p.v_descale);
  problem->scheduler_metadata = check::index_data(p.scheduler_metadata);
  problem->num_splits = p.num_splits;
  problem->pack_gqa = p.pack_gqa;
  problem->device = device.type;
  return {};
}

Status make_backward_problem(const BackwardParams& p, BackwardProblem* problem) {
  *problem = {};
  const TensorView none;
  SINKATTN_RETURN_IF_ERROR(check::shared(
      {p.query, p.key, p.value, p.cu_seqlens_q, p.cu_seqlens_k, p.seqused_q, p.seqused_k,
       p.max_seqlen_q, p.max_seqlen_k, none, none, none, p.learnable_sink, p.softmax_scale, p.mask,
       p.softcap, p.sm_margin, false, false},
      problem));
  const Device device = p.query.device;
  const std::int64_t d = problem->head_dim;
  const std::int64_t dv = problem->head_dim_v;
  if (dv > 256) {
    return Status::error(StatusCode::not_implemented,
                         "v: expected a head dim <= 256 in the backward, got %" PRId64, dv);
  }
  KeyStorage storage;
  SINKATTN_RETURN_IF_ERROR(check::key_storage(p.key, p.value, none, none, problem->batch,
                                              problem->packed_k, device, &storage));
  if (!p.dout.defined() && !p.dlse.defined()) {
    return Status::error(StatusCode::type_error, "dout: expected dout or dlse, got neither");
  }
  SINKATTN_RETURN_IF_ERROR(check::defined(p.out, "out"));
  SINKATTN_RETURN_IF_ERROR(like(p.out, "out", p.query, dv, p.query.dtype));
  if (p.dout.defined()) {
    SINKATTN_RETURN_IF_ERROR(like(p.dout, "dout", p.query, dv, p.query.dtype));
  }
  SINKATTN_RETURN_IF_ERROR(check::defined(p.softmax_lse, "softmax_lse"));
  const struct {
    const TensorView& tensor;
    const char* name;
  } statistics[] = {{p.softmax_lse, "softmax_lse"}, {p.dlse, "dlse"}, {p.softmax_d, "softmax_d"}};
  for (const auto& s : statistics) {
    SINKATTN_RETURN_IF_ERROR(check::statistics(s.tensor, s.name, *problem, p.query.dtype, device));
  }
  if (p.dk.defined() != p.dv.defined()) {
    return Status::error(StatusCode::value_error, "dk: expected dk and dv together, got one");
  }
  if (p.dq.defined()) SINKATTN_RETURN_IF_ERROR(like(p.dq, "dq", p.query, d, p.query.dtype));
  if (p.dk.defined()) {
    SINKATTN_RETURN_IF_ERROR(like(p.dk, "dk", p.key, d, p.query.dtype));
    SINKATTN_RETURN_IF_ERROR(like(p.dv, "dv", p.value, dv, p.query.dtype));
  }
  if (p.dsink.defined() != p.learnable_sink.defined()) {
    return Status::error(StatusCode::value_error,
                         "dsink: expected exactly together with learnable_sink, got one of them");
  }
  if (p.dsink.defined()) {
    SINKATTN_RETURN_IF_ERROR(check::same_device(p.dsink, "dsink", device));
    SINKATTN_RETURN_IF_ERROR(check::dtype(p.dsink, "dsink", p.learnable_sink.dtype));
    SINKATTN_RETURN_IF_ERROR(check::rank(p.dsink, "dsink", 1));
    SINKATTN_RETURN_IF_ERROR(check::size(p.dsink, "dsink", 0, problem->heads_q));
  }
  problem->query = check::heads_tensor(p.query, problem->packed_q);
  problem->key = check::heads_tensor(p.key, problem->packed_k);
  problem->value = check::heads_tensor(p.value, problem->packed_k);
  problem->out = check::heads_tensor(p.out, problem->packed_q);
  problem->dout = check::heads_tensor(p.dout, problem->packed_q);
  problem->dq = check::heads_tensor(p.dq, problem->packed_q);
  problem->dk = check::heads_tensor(p.dk, problem->packed_k);
  problem->dv = check::heads_tensor(p.dv, problem->packed_k);
  problem->lse = check::rows_tensor(p.softmax_lse, problem->packed_q);
  problem->dlse = check::rows_tensor(p.dlse, problem->packed_q);
  problem->softmax_d = check::rows_tensor(p.softmax_d, problem->packed_q);
  problem->dsink = check::vector_view(p.dsink);
  problem->deterministic = p.deterministic;
  problem->device = device.type;
  return {};
}

}  // namespace sinkattn
