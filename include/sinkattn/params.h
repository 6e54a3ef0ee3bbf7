// SPDX-License-Identifier: Apache-2.0
// One plain struct per operation: every argument with its shape, unit and default.
//
// Notation: b batch, sq / sk query / key length, h query heads, hk KV heads (h % hk == 0; query
// head i reads KV head i / (h / hk)), d head dim of query and key, dv head dim of value. "packed"
// tensors hold all sequences one after another, (total, heads, dim), delimited by cu_seqlens.
// Layout of 16-, 8- and 32-bit data tensors: last stride 1; on CUDA the base pointer and the other
// strides are multiples of 16 bytes. Index tensors are int32 and live on the device of `query`;
// their VALUES are untrusted and clamped where they are read, never believed.
#pragma once

#include <cstdint>
#include <optional>

#include "sinkattn/tensor.h"

namespace sinkattn {

/// Which keys a query row sees; see src/common/mask.h for the one definition.
struct MaskParams {
  bool causal = false;               ///< bottom-right aligned
  std::int64_t window_left = -1;     ///< keys visible to the left, inclusive count; < 0 unlimited
  std::int64_t window_right = -1;    ///< keys visible to the right; < 0 unlimited; causal forces 0
  std::int64_t attention_chunk = 0;  ///< keys of the query's own chunk of this length only; 0 off
};

enum class PackGqa : std::int8_t { automatic = -1, off = 0, on = 1 };

/// out = softmax([scores, sink]) without the sink column, times value.  Also serves the KV cache.
struct ForwardParams {
  TensorView query;  ///< (b, sq, h, d), or packed (total_q, h, d) with cu_seqlens_q
  TensorView key;    ///< (b_k, sk, hk, d); packed (total_k, hk, d); paged (pages, page_size, hk, d)
  TensorView value;  ///< as key, last dim dv
  TensorView query_v;  ///< optional, as query with last dim dv: adds query_v . value to the score

  TensorView out;          ///< (b, sq, h, dv) or (total_q, h, dv); dtype of query (bf16 for e4m3)
  TensorView softmax_lse;  ///< optional fp32 (fp64 with fp64 query), (b, h, sq) or (h, total_q)

  TensorView cu_seqlens_q;         ///< optional (b + 1,) int32: query is packed
  TensorView cu_seqlens_k;         ///< optional (b + 1,) int32: key and value are packed
  TensorView seqused_q;            ///< optional (b,) int32: only the first n query rows take part
  TensorView seqused_k;            ///< optional (b,) int32: only the first n keys (slots) take part
  std::int64_t max_seqlen_q = -1;  ///< upper bound, required with cu_seqlens_q; -1 not given
  std::int64_t max_seqlen_k = -1;  ///< upper bound, required with cu_seqlens_k; -1 not given

  TensorView page_table;       ///< optional (b_k, max_pages) int32: key and value are paged
  TensorView cache_batch_idx;  ///< optional (b,) int32: row of key/value (or page_table) to read
  TensorView cache_leftpad;    ///< optional (b,) int32: first used slot; positions count from it

  TensorView q_descale, k_descale, v_descale;  ///< (b, hk) fp32, e4m3 only

  TensorView learnable_sink;  ///< optional (h,) fp32, bf16, fp16 (fp64 with fp64 query); any stride

  std::optional<double> softmax_scale;  ///< > 0; default d^-0.5, with query_v (d + dv)^-0.5
  MaskParams mask;
  double softcap = 0.0;  ///< c > 0: scores become c * tanh(score / c); 0 off

  TensorView scheduler_metadata;  ///< optional int32, from schedule(); read-only
  int num_splits = 1;             ///< 0 heuristic, 1 none, n exactly n; <= 256
  PackGqa pack_gqa = PackGqa::automatic;
  int sm_margin = 0;  ///< SMs left free for other work
};

/// Gradients of forward() for dense and packed inputs.
struct BackwardParams {
  TensorView dout;  ///< as out; optional if dlse is given
  TensorView dlse;  ///< optional, as softmax_lse: gradient of the returned LSE

  TensorView query, key, value;  ///< as in the forward; no paged keys, no e4m3, no query_v
  TensorView out;                ///< output of the forward (or of a merge)
  TensorView softmax_lse;        ///< its LSE, including the sink if there was one

  TensorView dq, dk, dv;  ///< as query, key, value; undefined: not wanted (dk and dv go together)
  TensorView dsink;       ///< (h,), dtype of learnable_sink; defined exactly if learnable_sink is
  TensorView softmax_d;   ///< optional fp32 output D' = rowsum(dout * out) - dlse, as softmax_lse

  TensorView cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k;
  std::int64_t max_seqlen_q = -1, max_seqlen_k = -1;

  TensorView learnable_sink;  ///< used for dsink alone: softmax_lse already contains the sink

  std::optional<double> softmax_scale;
  MaskParams mask;
  double softcap = 0.0;
  bool deterministic = false;  ///< bitwise repeatable dq, dk, dv (dsink always is)
  int sm_margin = 0;
};

/// Writes new keys and values into a cache, rotating them (and the queries) on the way.
struct AppendParams {
  TensorView key_new, value_new;      ///< (b, s_new, hk, ..) or packed (total_new, hk, ..)
  TensorView cu_seqlens_k_new;        ///< optional (b + 1,) int32
  TensorView key_cache, value_cache;  ///< dense (b_k, capacity, hk, ..) or paged; written in place
  TensorView cache_seqlens;  ///< (b,) int32: used slots before the append; new key t goes to + t
  TensorView cache_batch_idx, cache_leftpad, page_table;

  TensorView rotary_cos, rotary_sin;  ///< optional (seqlen_ro, rotary_dim / 2), dtype of query
  TensorView rotary_seqlens;          ///< optional (b,): position offset instead of cache_seqlens
  bool rotary_interleaved = true;     ///< pairs (0, 1), ..; false: (0, rotary_dim / 2), ..

  TensorView query;          ///< rotated when rotary_cos is given; otherwise may be undefined
  TensorView query_rotated;  ///< output, as query
  TensorView cu_seqlens_q, seqused_q;
  std::int64_t max_seqlen_q = -1;
  TensorView seqused_k_after;  ///< output (b,) int32: used slots after the append, clamped
  MaskParams mask;             ///< queries rotate at their own position if causal or windowed
};

/// Merges partial results (splits, context-parallel ranks); the sink enters here exactly once.
struct CombineParams {
  TensorView out_partial;     ///< (n, b, s, h, dv) or (n, total, h, dv) fp32 (fp64 on the CPU)
  TensorView lse_partial;     ///< (n, b, s, h) or (n, total, h), sink-free
  TensorView out;             ///< (b, s, h, dv) or (total, h, dv); fp32, bf16, fp16 (fp64)
  TensorView softmax_lse;     ///< (b, s, h) or (total, h), any strides
  TensorView learnable_sink;  ///< optional (h,)
};

/// Shape facts from which the split of a decode step is precomputed (get_scheduler_metadata).
struct ScheduleParams {
  std::int64_t batch_size = 0, max_seqlen_q = 0, max_seqlen_k = 0;
  std::int64_t num_heads_q = 0, num_heads_kv = 0, headdim = 0, headdim_v = 0;
  DType qkv_dtype = DType::bfloat16;
  TensorView cache_seqlens, cu_seqlens_q, cu_seqlens_k_new, cache_leftpad;
  std::int64_t page_size = 0;  ///< 0: not paged
  std::int64_t max_seqlen_k_new = 0;
  MaskParams mask;
  bool has_softcap = false;
  int num_splits = 0;
  PackGqa pack_gqa = PackGqa::automatic;
  int sm_margin = 0;
  TensorView metadata;  ///< output int32 (schedule_length(batch_size),)
};

}  // namespace sinkattn
