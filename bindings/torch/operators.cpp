// SPDX-License-Identifier: Apache-2.0
// The operators of namespace `sinkattn`: tensors -> params -> plan -> run. Schemas are append-only.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <utility>

#include "common/prepared.h"
#include "convert.h"

namespace sinkattn::torch_binding {
namespace {

using Int = std::int64_t;
using OptionalInt = std::optional<std::int64_t>;
using OptionalDouble = std::optional<double>;
using OptionalBool = std::optional<bool>;

PackGqa pack_gqa_of(const OptionalBool& value) {
  if (!value.has_value()) return PackGqa::automatic;
  return *value ? PackGqa::on : PackGqa::off;
}

MaskParams mask_of(bool causal, Int window_left, Int window_right, Int attention_chunk) {
  return {causal, window_left, window_right, attention_chunk};
}

int narrow_int(Int value, const char* name) {
  if (value < -(Int{1} << 30) || value > (Int{1} << 30)) {
    raise_if_error(Status::error(StatusCode::value_error, "%s: expected a small integer, got %lld",
                                 name, static_cast<long long>(value)));
  }
  return static_cast<int>(value);
}

DType statistics_dtype(DType query) {
  return query == DType::float64 ? DType::float64 : DType::float32;
}

Tensor new_statistics(const TensorView& query, bool packed) {
  const TensorView lse = statistics_view(query, packed);
  return new_empty(lse, lse.shape, lse.rank, lse.dtype);
}

Tensor new_out(const ForwardParams& params) {
  const TensorView out = out_view(params);
  return new_empty(out, out.shape, out.rank, out.dtype);
}

/// Arguments of fwd after q, k, v, as one bundle: fwd, fwd_out, fwd_kvcache and the plan text share
/// them.
#define SINKATTN_FORWARD_PARAMETERS                                                        \
  const OptionalTensor &qv, const OptionalTensor &cu_seqlens_q,                            \
      const OptionalTensor &cu_seqlens_k, const OptionalTensor &seqused_q,                 \
      const OptionalTensor &seqused_k, OptionalInt max_seqlen_q, OptionalInt max_seqlen_k, \
      const OptionalTensor &page_table, const OptionalTensor &cache_batch_idx,             \
      const OptionalTensor &cache_leftpad, const OptionalTensor &q_descale,                \
      const OptionalTensor &k_descale, const OptionalTensor &v_descale,                    \
      OptionalDouble softmax_scale, bool causal, Int window_left, Int window_right,        \
      Int attention_chunk, double softcap, const OptionalTensor &scheduler_metadata,       \
      Int num_splits, OptionalBool pack_gqa, Int sm_margin, const OptionalTensor &learnable_sink
#define SINKATTN_FORWARD_ARGUMENTS                                                              \
  qv, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k, page_table, \
      cache_batch_idx, cache_leftpad, q_descale, k_descale, v_descale, softmax_scale, causal,   \
      window_left, window_right, attention_chunk, softcap, scheduler_metadata, num_splits,      \
      pack_gqa, sm_margin, learnable_sink

ForwardParams forward_params(const Tensor& q, const Tensor& k, const Tensor& v,
                             SINKATTN_FORWARD_PARAMETERS) {
  ForwardParams p;
  p.query = view(q, "q");
  p.key = view(k, "k");
  p.value = view(v, "v");
  p.query_v = view(qv, "qv");
  p.cu_seqlens_q = view(cu_seqlens_q, "cu_seqlens_q");
  p.cu_seqlens_k = view(cu_seqlens_k, "cu_seqlens_k");
  p.seqused_q = view(seqused_q, "seqused_q");
  p.seqused_k = view(seqused_k, "seqused_k");
  p.max_seqlen_q = max_seqlen_q.value_or(-1);
  p.max_seqlen_k = max_seqlen_k.value_or(-1);
  p.page_table = view(page_table, "page_table");
  p.cache_batch_idx = view(cache_batch_idx, "cache_batch_idx");
  p.cache_leftpad = view(cache_leftpad, "cache_leftpad");
  p.q_descale = view(q_descale, "q_descale");
  p.k_descale = view(k_descale, "k_descale");
  p.v_descale = view(v_descale, "v_descale");
  p.learnable_sink = view(learnable_sink, "learnable_sink");
  p.softmax_scale = softmax_scale;
  p.mask = mask_of(causal, window_left, window_right, attention_chunk);
  p.softcap = softcap;
  p.scheduler_metadata = view(scheduler_metadata, "scheduler_metadata");
  p.num_splits = narrow_int(num_splits, "num_splits");
  p.pack_gqa = pack_gqa_of(pack_gqa);
  p.sm_margin = narrow_int(sm_margin, "sm_margin");
  check_query_rank(p.query, p.cu_seqlens_q.defined());
  return p;
}

Tensor fwd_out(const Tensor& out, const Tensor& q, const Tensor& k, const Tensor& v,
               SINKATTN_FORWARD_PARAMETERS) {
  Call call(q);
  ForwardParams params = forward_params(q, k, v, SINKATTN_FORWARD_ARGUMENTS);
  Tensor lse = new_statistics(params.query, params.cu_seqlens_q.defined());
  params.out = view(out, "out");
  params.softmax_lse = view(lse, "softmax_lse");
  call.run(params);
  return lse;
}

std::tuple<Tensor, Tensor> fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                               SINKATTN_FORWARD_PARAMETERS) {
  Call call(q);
  ForwardParams params = forward_params(q, k, v, SINKATTN_FORWARD_ARGUMENTS);
  Tensor out = new_out(params);
  Tensor lse = new_statistics(params.query, params.cu_seqlens_q.defined());
  params.out = view(out, "out");
  params.softmax_lse = view(lse, "softmax_lse");
  call.run(params);
  return {std::move(out), std::move(lse)};
}

/// Arguments of fwd in the common case alone: every argument of an operator costs the caller time
/// in torch's conversions, given or not.
#define SINKATTN_DENSE_PARAMETERS                                                          \
  const Tensor &q, const Tensor &k, const Tensor &v, const OptionalTensor &learnable_sink, \
      OptionalDouble softmax_scale, bool causal, Int window_left, Int window_right
#define SINKATTN_DENSE_ARGUMENTS \
  q, k, v, learnable_sink, softmax_scale, causal, window_left, window_right

ForwardParams dense_params(SINKATTN_DENSE_PARAMETERS) {
  ForwardParams p;
  p.query = view(q, "q");
  p.key = view(k, "k");
  p.value = view(v, "v");
  p.learnable_sink = view(learnable_sink, "learnable_sink");
  p.softmax_scale = softmax_scale;
  p.mask = mask_of(causal, window_left, window_right, 0);
  check_dense(p);
  return p;
}

std::tuple<Tensor, Tensor> fwd_dense(SINKATTN_DENSE_PARAMETERS) {
  Call call(q);
  ForwardParams params = dense_params(SINKATTN_DENSE_ARGUMENTS);
  Tensor out = new_out(params);
  Tensor lse = new_statistics(params.query, false);
  params.out = view(out, "out");
  params.softmax_lse = view(lse, "softmax_lse");
  call.run(params);
  return {std::move(out), std::move(lse)};
}

/// fwd_dense where nobody asks for the LSE: it is neither allocated nor written.
Tensor fwd_dense_no_lse(SINKATTN_DENSE_PARAMETERS) {
  Call call(q);
  ForwardParams params = dense_params(SINKATTN_DENSE_ARGUMENTS);
  Tensor out = new_out(params);
  params.out = view(out, "out");
  call.run(params);
  return out;
}

/// fwd for exported training graphs: the operator to which Python attaches a gradient, with the
/// option that only the gradient reads.
std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     SINKATTN_FORWARD_PARAMETERS, bool deterministic) {
  (void)deterministic;
  return fwd(q, k, v, SINKATTN_FORWARD_ARGUMENTS);
}

std::string explain_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                        SINKATTN_FORWARD_PARAMETERS) {
  Call call(q);
  ForwardParams params = forward_params(q, k, v, SINKATTN_FORWARD_ARGUMENTS);
  Tensor out = new_out(params);
  params.out = view(out, "out");
  Plan plan;
  raise_if_error(plan_forward(params, call.device(), &plan));
  return std::string("kernel ") + plan.kernel + ", tile " + std::to_string(plan.tile_m) + "x" +
         std::to_string(plan.tile_n) + ", splits " + std::to_string(plan.num_splits) +
         (plan.pack_gqa ? ", packed heads" : ", unpacked heads") + ", workspace " +
         std::to_string(plan.workspace_bytes) + " bytes: " + plan.reason;
}

Tensor fwd_kvcache(const Tensor& out, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                   const Tensor& k_new, const Tensor& v_new, const OptionalTensor& cu_seqlens_k_new,
                   const OptionalTensor& rotary_cos, const OptionalTensor& rotary_sin,
                   const OptionalTensor& rotary_seqlens, bool rotary_interleaved,
                   SINKATTN_FORWARD_PARAMETERS) {
  Call call(q);
  ForwardParams params = forward_params(q, k_cache, v_cache, SINKATTN_FORWARD_ARGUMENTS);
  AppendParams append;
  append.key_new = view(k_new, "k");
  append.value_new = view(v_new, "v");
  append.cu_seqlens_k_new = view(cu_seqlens_k_new, "cu_seqlens_k_new");
  append.key_cache = params.key;
  append.value_cache = params.value;
  append.cache_seqlens = view(seqused_k, "cache_seqlens");
  append.cache_batch_idx = params.cache_batch_idx;
  append.cache_leftpad = params.cache_leftpad;
  append.page_table = params.page_table;
  append.rotary_cos = view(rotary_cos, "rotary_cos");
  append.rotary_sin = view(rotary_sin, "rotary_sin");
  append.rotary_seqlens = view(rotary_seqlens, "rotary_seqlens");
  append.rotary_interleaved = rotary_interleaved;
  append.cu_seqlens_q = params.cu_seqlens_q;
  append.seqused_q = params.seqused_q;
  append.max_seqlen_q = params.max_seqlen_q;
  append.mask = params.mask;
  OptionalTensor rotated;
  if (rotary_cos.has_value()) {
    rotated = new_empty_like(q);
    append.query = params.query;
    append.query_rotated = view(*rotated, "q");
    params.query = append.query_rotated;
  }
  OptionalTensor used;
  if (seqused_k.has_value()) {
    used = new_empty_like(*seqused_k);
    append.seqused_k_after = view(*used, "cache_seqlens");
    params.seqused_k = append.seqused_k_after;
  }
  Tensor lse = new_statistics(params.query, params.cu_seqlens_q.defined());
  params.out = view(out, "out");
  params.softmax_lse = view(lse, "softmax_lse");
  // The attention is checked before the cache is written: a refused call changes nothing.
  Plan attention_plan;
  raise_if_error(plan_forward(params, call.device(), &attention_plan));
  Plan append_plan;
  raise_if_error(plan_append_kv(append, call.device(), &append_plan));
  raise_if_error(append_kv(append, append_plan, call.context(append_plan)));
  raise_if_error(forward(params, attention_plan, call.context(attention_plan)));
  return lse;
}

/// Arguments of bwd after dout and dlse.
#define SINKATTN_BACKWARD_PARAMETERS                                                              \
  const OptionalTensor &dout, const OptionalTensor &dlse, const Tensor &q, const Tensor &k,       \
      const Tensor &v, const Tensor &out, const Tensor &softmax_lse,                              \
      const OptionalTensor &cu_seqlens_q, const OptionalTensor &cu_seqlens_k,                     \
      const OptionalTensor &seqused_q, const OptionalTensor &seqused_k, OptionalInt max_seqlen_q, \
      OptionalInt max_seqlen_k, OptionalDouble softmax_scale, bool causal, Int window_left,       \
      Int window_right, Int attention_chunk, double softcap, bool deterministic, Int sm_margin,   \
      bool need_dq, bool need_dkv, const OptionalTensor &learnable_sink
#define SINKATTN_BACKWARD_ARGUMENTS                                                        \
  dout, dlse, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, \
      max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_left, window_right,        \
      attention_chunk, softcap, deterministic, sm_margin, need_dq, need_dkv, learnable_sink

BackwardParams backward_params(SINKATTN_BACKWARD_PARAMETERS) {
  (void)need_dq, (void)need_dkv;
  BackwardParams p;
  p.dout = view(dout, "dout");
  p.dlse = view(dlse, "dlse");
  p.query = view(q, "q");
  p.key = view(k, "k");
  p.value = view(v, "v");
  p.out = view(out, "out");
  p.softmax_lse = view(softmax_lse, "softmax_lse");
  p.cu_seqlens_q = view(cu_seqlens_q, "cu_seqlens_q");
  p.cu_seqlens_k = view(cu_seqlens_k, "cu_seqlens_k");
  p.seqused_q = view(seqused_q, "seqused_q");
  p.seqused_k = view(seqused_k, "seqused_k");
  p.max_seqlen_q = max_seqlen_q.value_or(-1);
  p.max_seqlen_k = max_seqlen_k.value_or(-1);
  p.softmax_scale = softmax_scale;
  p.mask = mask_of(causal, window_left, window_right, attention_chunk);
  p.softcap = softcap;
  p.deterministic = deterministic;
  p.sm_margin = narrow_int(sm_margin, "sm_margin");
  p.learnable_sink = view(learnable_sink, "learnable_sink");
  check_query_rank(p.query, p.cu_seqlens_q.defined());
  return p;
}

/// dsink for a sink, or an empty tensor without one.
Tensor new_dsink(const Tensor& q, const OptionalTensor& sink) {
  if (!sink.has_value()) return new_empty(q, {0}, DType::float32);
  return new_empty_like(*sink);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bwd(SINKATTN_BACKWARD_PARAMETERS) {
  Call call(q);
  BackwardParams params = backward_params(SINKATTN_BACKWARD_ARGUMENTS);
  const DType type = params.query.dtype;
  Tensor dq = need_dq ? new_empty_like(q) : new_empty(q, {0}, type);
  Tensor dk = need_dkv ? new_empty_like(k) : new_empty(q, {0}, type);
  Tensor dv = need_dkv ? new_empty_like(v) : new_empty(q, {0}, type);
  Tensor dsink = new_dsink(q, learnable_sink);
  if (need_dq) params.dq = view(dq, "dq");
  if (need_dkv) {
    params.dk = view(dk, "dk");
    params.dv = view(dv, "dv");
  }
  if (learnable_sink.has_value()) params.dsink = view(dsink, "dsink");
  call.run(params);
  return {dq, dk, dv, dsink};
}

/// D' padded as FA3 pads it: rows to a multiple of 128, in packed form 128 more per sequence.
Tensor new_softmax_d(const Tensor& q, const BackwardParams& params) {
  const TensorView& query = params.query;
  const auto round_up = [](Int n) { return (n + 127) / 128 * 128; };
  const DType type = statistics_dtype(query.dtype);
  Tensor d = query.rank == 3
                 ? new_empty(q,
                             {query.shape[1],
                              round_up(query.shape[0] + (params.cu_seqlens_q.shape[0] - 1) * 128)},
                             type)
                 : new_empty(q, {query.shape[0], query.shape[2], round_up(query.shape[1])}, type);
  torch::stable::zero_(d);
  return d;
}

std::tuple<Tensor, Tensor> bwd_out(const Tensor& dq, const Tensor& dk, const Tensor& dv,
                                   SINKATTN_BACKWARD_PARAMETERS) {
  Call call(q);
  BackwardParams params = backward_params(SINKATTN_BACKWARD_ARGUMENTS);
  Tensor d = new_softmax_d(q, params);
  Tensor dsink = new_dsink(q, learnable_sink);
  params.softmax_d = view(d, "softmax_d");
  params.softmax_d.shape[params.softmax_d.rank - 1] = params.query.shape[params.query.rank - 3];
  if (need_dq) params.dq = view(dq, "dq");
  if (need_dkv) {
    params.dk = view(dk, "dk");
    params.dv = view(dv, "dv");
  }
  if (learnable_sink.has_value()) params.dsink = view(dsink, "dsink");
  call.run(params);
  return {d, dsink};
}

Tensor combine_into(const Tensor& out, const Tensor& out_partial, const Tensor& lse_partial,
                    const OptionalTensor& learnable_sink) {
  Call call(out_partial);
  CombineParams params;
  params.out_partial = view(out_partial, "out_partial");
  params.lse_partial = view(lse_partial, "lse_partial");
  params.out = view(out, "out");
  params.learnable_sink = view(learnable_sink, "learnable_sink");
  const TensorView& partial = params.out_partial;
  // Memory order (.., h, rows): returned as the transposed view that FA3 returns.
  const bool packed = partial.rank == 4;
  const Int heads = partial.size_back(1);
  const Int rows = partial.size_back(2);
  Tensor lse = packed ? new_empty(out_partial, {heads, rows}, partial.dtype)
                      : new_empty(out_partial, {partial.shape[1], heads, rows}, partial.dtype);
  lse = torch::stable::transpose(lse, packed ? 0 : 1, packed ? 1 : 2);
  params.softmax_lse = view(lse, "softmax_lse");
  Plan plan;
  raise_if_error(plan_combine(params, call.device(), &plan));
  raise_if_error(combine(params, plan, call.context(plan)));
  return lse;
}

void check_partial_rank(const Tensor& out_partial) {
  const Int rank = out_partial.dim();
  if (rank == 4 || rank == 5) return;
  raise_if_error(Status::error(StatusCode::value_error,
                               "out_partial: expected (n, b, s, h, dv) or (n, total, h, dv), got "
                               "%lld dimensions",
                               static_cast<long long>(rank)));
}

std::tuple<Tensor, Tensor> combine_op(const Tensor& out_partial, const Tensor& lse_partial,
                                      std::optional<ScalarType> out_dtype,
                                      const OptionalTensor& learnable_sink) {
  check_partial_rank(out_partial);
  const auto sizes = out_partial.sizes();
  Tensor out = torch::stable::new_empty(out_partial, {sizes.data() + 1, sizes.size() - 1},
                                        out_dtype.value_or(out_partial.scalar_type()));
  Tensor lse = combine_into(out, out_partial, lse_partial, learnable_sink);
  return {out, lse};
}

Tensor combine_out(const Tensor& out, const Tensor& out_partial, const Tensor& lse_partial,
                   const OptionalTensor& learnable_sink) {
  check_partial_rank(out_partial);
  return combine_into(out, out_partial, lse_partial, learnable_sink);
}

Tensor get_scheduler_metadata(Int batch_size, Int max_seqlen_q, Int max_seqlen_k, Int num_heads_q,
                              Int num_heads_kv, Int headdim, Int headdim_v, ScalarType qkv_dtype,
                              const Tensor& cache_seqlens, const OptionalTensor& cu_seqlens_q,
                              const OptionalTensor& cu_seqlens_k_new,
                              const OptionalTensor& cache_leftpad, OptionalInt page_size,
                              Int max_seqlen_k_new, bool causal, Int window_left, Int window_right,
                              Int attention_chunk, bool has_softcap, Int num_splits,
                              OptionalBool pack_gqa, Int sm_margin) {
  (void)qkv_dtype;
  Call call(cache_seqlens);
  if (batch_size < 0 || batch_size > (Int{1} << 30)) {
    raise_if_error(Status::error(StatusCode::value_error,
                                 "batch_size: expected an integer in [0, 2^30], got %lld",
                                 static_cast<long long>(batch_size)));
  }
  Tensor metadata = new_empty(cache_seqlens, {schedule_length(batch_size)}, DType::int32);
  ScheduleParams p;
  p.batch_size = batch_size;
  p.max_seqlen_q = max_seqlen_q;
  p.max_seqlen_k = max_seqlen_k;
  p.num_heads_q = num_heads_q;
  p.num_heads_kv = num_heads_kv;
  p.headdim = headdim;
  p.headdim_v = headdim_v;
  p.cache_seqlens = view(cache_seqlens, "cache_seqlens");
  p.cu_seqlens_q = view(cu_seqlens_q, "cu_seqlens_q");
  p.cu_seqlens_k_new = view(cu_seqlens_k_new, "cu_seqlens_k_new");
  p.cache_leftpad = view(cache_leftpad, "cache_leftpad");
  p.page_size = page_size.value_or(0);
  p.max_seqlen_k_new = max_seqlen_k_new;
  p.mask = mask_of(causal, window_left, window_right, attention_chunk);
  p.has_softcap = has_softcap;
  p.num_splits = narrow_int(num_splits, "num_splits");
  p.pack_gqa = pack_gqa_of(pack_gqa);
  p.sm_margin = narrow_int(sm_margin, "sm_margin");
  p.metadata = view(metadata, "metadata");
  Plan plan;
  raise_if_error(plan_schedule(p, call.device(), &plan));
  raise_if_error(schedule(p, plan, call.context(plan)));
  return metadata;
}

#define SINKATTN_FORWARD_SCHEMA                                                         \
  "Tensor? qv=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "             \
  "Tensor? seqused_q=None, Tensor? seqused_k=None, SymInt? max_seqlen_q=None, "         \
  "SymInt? max_seqlen_k=None, Tensor? page_table=None, Tensor? cache_batch_idx=None, "  \
  "Tensor? cache_leftpad=None, Tensor? q_descale=None, Tensor? k_descale=None, "        \
  "Tensor? v_descale=None, float? softmax_scale=None, bool causal=False, "              \
  "int window_left=-1, int window_right=-1, int attention_chunk=0, float softcap=0.0, " \
  "Tensor? scheduler_metadata=None, int num_splits=1, bool? pack_gqa=None, "            \
  "int sm_margin=0, Tensor? learnable_sink=None"
#define SINKATTN_DENSE_SCHEMA                                          \
  "Tensor q, Tensor k, Tensor v, Tensor? learnable_sink=None, "        \
  "float? softmax_scale=None, bool causal=False, int window_left=-1, " \
  "int window_right=-1"
#define SINKATTN_BACKWARD_SCHEMA                                                        \
  "Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "              \
  "Tensor softmax_lse, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "          \
  "Tensor? seqused_q=None, Tensor? seqused_k=None, SymInt? max_seqlen_q=None, "         \
  "SymInt? max_seqlen_k=None, float? softmax_scale=None, bool causal=False, "           \
  "int window_left=-1, int window_right=-1, int attention_chunk=0, float softcap=0.0, " \
  "bool deterministic=False, int sm_margin=0, bool need_dq=True, bool need_dkv=True, "  \
  "Tensor? learnable_sink=None"

template <class Library>
void implement(Library& m) {
  m.impl("fwd", TORCH_BOX(&fwd));
  m.impl("fwd_dense", TORCH_BOX(&fwd_dense));
  m.impl("fwd_dense_no_lse", TORCH_BOX(&fwd_dense_no_lse));
  m.impl("fwd_out", TORCH_BOX(&fwd_out));
  m.impl("fwd_kvcache", TORCH_BOX(&fwd_kvcache));
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("explain_fwd", TORCH_BOX(&explain_fwd));
  m.impl("bwd", TORCH_BOX(&bwd));
  m.impl("bwd_out", TORCH_BOX(&bwd_out));
  m.impl("combine", TORCH_BOX(&combine_op));
  m.impl("combine_out", TORCH_BOX(&combine_out));
  m.impl("get_scheduler_metadata", TORCH_BOX(&get_scheduler_metadata));
}

}  // namespace

STABLE_TORCH_LIBRARY(sinkattn, m) {
  m.def("fwd(Tensor q, Tensor k, Tensor v, " SINKATTN_FORWARD_SCHEMA
        ") -> (Tensor out, Tensor softmax_lse)");
  m.def("fwd_dense(" SINKATTN_DENSE_SCHEMA ") -> (Tensor out, Tensor softmax_lse)");
  m.def("fwd_dense_no_lse(" SINKATTN_DENSE_SCHEMA ") -> Tensor out");
  m.def("fwd_out(Tensor(a!) out, Tensor q, Tensor k, Tensor v, " SINKATTN_FORWARD_SCHEMA
        ") -> Tensor softmax_lse");
  m.def(
      "fwd_kvcache(Tensor(a!) out, Tensor q, Tensor(b!) k_cache, Tensor(c!) v_cache, "
      "Tensor k_new, Tensor v_new, Tensor? cu_seqlens_k_new=None, Tensor? rotary_cos=None, "
      "Tensor? rotary_sin=None, Tensor? rotary_seqlens=None, bool "
      "rotary_interleaved=True, " SINKATTN_FORWARD_SCHEMA ") -> Tensor softmax_lse");
  m.def("attention(Tensor q, Tensor k, Tensor v, " SINKATTN_FORWARD_SCHEMA
        ", bool deterministic=False) -> (Tensor out, Tensor softmax_lse)");
  m.def("explain_fwd(Tensor q, Tensor k, Tensor v, " SINKATTN_FORWARD_SCHEMA ") -> str");
  m.def("bwd(" SINKATTN_BACKWARD_SCHEMA ") -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsink)");
  m.def("bwd_out(Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, " SINKATTN_BACKWARD_SCHEMA
        ") -> (Tensor softmax_d, Tensor dsink)");
  m.def(
      "combine(Tensor out_partial, Tensor lse_partial, ScalarType? out_dtype=None, "
      "Tensor? learnable_sink=None) -> (Tensor out, Tensor softmax_lse)");
  m.def(
      "combine_out(Tensor(a!) out, Tensor out_partial, Tensor lse_partial, "
      "Tensor? learnable_sink=None) -> Tensor softmax_lse");
  m.def(
      "get_scheduler_metadata(SymInt batch_size, SymInt max_seqlen_q, SymInt max_seqlen_k, "
      "int num_heads_q, int num_heads_kv, int headdim, int headdim_v, ScalarType qkv_dtype, "
      "Tensor cache_seqlens, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k_new=None, "
      "Tensor? cache_leftpad=None, int? page_size=None, int max_seqlen_k_new=0, "
      "bool causal=False, int window_left=-1, int window_right=-1, int attention_chunk=0, "
      "bool has_softcap=False, int num_splits=0, bool? pack_gqa=None, int sm_margin=0) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sinkattn, CPU, m) { implement(m); }
STABLE_TORCH_LIBRARY_IMPL(sinkattn, CUDA, m) { implement(m); }

}  // namespace sinkattn::torch_binding

/// What the library was built with, for build_info().
extern "C" __attribute__((visibility("default"))) const char* sinkattn_version() {
  return sinkattn::version();
}
extern "C" __attribute__((visibility("default"))) int sinkattn_built_with_cuda() {
  return sinkattn::built_with_cuda() ? 1 : 0;
}
