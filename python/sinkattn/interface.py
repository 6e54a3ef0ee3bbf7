# SPDX-License-Identifier: Apache-2.0
"""Attention with a learnable sink: the functions that FlashAttention-3 users already call.

Shapes: b sequences, sq / sk query / key length, h query heads, hk KV heads (query head i reads KV
head i // (h // hk)), d head dim of q and k, dv head dim of v. Packed ("varlen") tensors hold all
sequences one after another, (total, heads, dim), delimited by cu_seqlens.

The sink is one natural-log logit per query head that joins the softmax denominator and has no
value: ``out_i = sum_j exp(s_ij) v_j / (sum_j exp(s_ij) + exp(sink))``. It is not scaled by
softmax_scale, not soft-capped and never masked. ``s_aux`` and ``sinks`` are other names for
``learnable_sink``. softmax_lse is fp32 in natural log and includes the sink.

Errors: TypeError for wrong types and dtypes, ValueError for shapes, ranges and contradictions,
NotImplementedError for valid requests that this build cannot serve, RuntimeError for CUDA failures;
the text is always ``<argument>: expected <what>, got <what>``.
"""

from __future__ import annotations

from torch.compiler import is_dynamo_compiling

from . import _direct
from ._arguments import integer, one_sink, tensor
from ._cache import flash_attn_with_kvcache, get_scheduler_metadata
from ._compatibility import (
    _flash_attn_backward,
    _flash_attn_forward,
    maybe_contiguous,
    round_multiple,
    round_up_headdim,
)
from ._execute import attend, attend_dense, attend_packed, make_options
from ._merge import flash_attn_combine, merge_attention
from .autograd import (
    FlashAttnFunc,
    FlashAttnQKVPackedFunc,
    FlashAttnVarlenFunc,
)

__all__ = [
    "FlashAttnFunc",
    "FlashAttnQKVPackedFunc",
    "FlashAttnVarlenFunc",
    "_flash_attn_backward",
    "_flash_attn_forward",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
    "maybe_contiguous",
    "merge_attention",
    "round_multiple",
    "round_up_headdim",
]


# Compared by identity, which also rules out 0.0, False and tensors; where an interpreter shares no
# small integers the call merely takes the general path.
_ZERO, _ONE = 0, 1


def flash_attn_func(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
    *,
    s_aux=None,
    sinks=None,
    learnable_sink=None,
):
    """Attention over dense batches, differentiable in q, k, v and the sink.

    Args:
        q: (b, sq, h, d); bf16, fp16 or e4m3 (on the CPU also fp32 and fp64). d a multiple of 8
            (e4m3: 16), at most 256.
        k: (b, sk, hk, d), dtype of q; h a multiple of hk.
        v: (b, sk, hk, dv); dv a multiple of 8, at most 256 (512 with d <= 64, forward only).
        softmax_scale: finite, > 0; default d**-0.5, with qv (d + dv)**-0.5.
        causal: aligned to the bottom right: row i sees keys up to i + sk - sq.
        qv: as q with last dim dv; adds qv . v to the score (d <= 64, dv >= 256; forward only).
        q_descale, k_descale, v_descale: (b, hk) fp32, with e4m3 inputs only.
        window_size: keys visible to the (left, right) of the row's own position, inclusive counts;
            negative or None is unlimited. A window of 128 tokens with causal is (127, 0).
        attention_chunk: a row sees only keys of its own chunk of this many positions; 0 off.
        softcap: c > 0 turns a score s into c * tanh(s / c); 0 off.
        num_splits: key splits, 0 heuristic, 1 none, at most 256.
        pack_gqa: None lets the library choose; the results are the same.
        deterministic: bitwise repeatable dq, dk, dv (the forward and dsink always are).
        sm_margin: SMs left free for other work; on CUDA in the forward alone, > 0 raises with a
            gradient.
        return_attn_probs: also return softmax_lse (never probabilities).
        learnable_sink: (h,) fp32, bf16 or fp16 (fp64 with fp64 q), any stride.

    Returns:
        out (b, sq, h, dv) in the dtype of q (bf16 for e4m3), or (out, softmax_lse (b, h, sq)).
        The LSE is differentiable as well.

    The signature is FlashAttention-3's with the sink added.
    """
    if not is_dynamo_compiling():  # other tracers are modes, which the direct entry asks for
        result = _direct.call(
            q, k, v, softmax_scale, causal, qv, q_descale, k_descale, v_descale, window_size,
            attention_chunk, softcap, num_splits, pack_gqa, deterministic, sm_margin,
            return_attn_probs, s_aux, sinks, learnable_sink,
        )  # fmt: skip
        if result is not None:
            return result
    if (
        attention_chunk is _ZERO
        and num_splits is _ONE
        and sm_margin is _ZERO
        and type(softcap) is float
        and softcap == 0.0
        and qv is q_descale is k_descale is v_descale is pack_gqa is s_aux is sinks is None
    ):
        result = attend_dense(
            q, k, v, learnable_sink, softmax_scale, causal, window_size, deterministic,
            return_attn_probs,
        )  # fmt: skip
        if result is not None:
            return result
    options = make_options(
        causal=causal,
        window_size=window_size,
        softmax_scale=softmax_scale,
        attention_chunk=attention_chunk,
        softcap=softcap,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        deterministic=deterministic,
        sm_margin=sm_margin,
        qv=qv,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
    )
    sink = one_sink(s_aux, sinks, learnable_sink)
    return attend(options, q, k, v, sink, return_lse=return_attn_probs)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
    *,
    page_table=None,
    scheduler_metadata=None,
    out=None,
    s_aux=None,
    sinks=None,
    learnable_sink=None,
):
    """Attention over packed sequences of different lengths; see flash_attn_func.

    Args beyond flash_attn_func:
        q: (total_q, h, d) with cu_seqlens_q, or (b, sq, h, d) where cu_seqlens_q is None.
        k, v: (total_k, hk, ..) with cu_seqlens_k, else (b, sk, hk, ..), or with page_table pages
            (num_pages, page_size, hk, ..).
        cu_seqlens_q, cu_seqlens_k: (b + 1,) int32 on the device of q: sequence i is rows
            [cu[i], cu[i + 1]). Values out of range are clamped.
        max_seqlen_q, max_seqlen_k: upper bounds of the lengths (int, or a 0-d tensor, which is
            read). A sequence longer than the bound is treated as truncated there.
        seqused_q, seqused_k: (b,) int32: only the first n tokens of each sequence take part.
        page_table: (b, max_pages) int32 with seqused_k (forward only).
        scheduler_metadata: from get_scheduler_metadata; read-only.
        out: the output tensor (inference only: ValueError where a gradient is wanted).

    Returns:
        out (total_q, h, dv), or (out, softmax_lse (h, total_q)). Rows that belong to no sequence
        are 0 (LSE -inf).
    """
    options = make_options(
        causal=causal,
        window_size=window_size,
        softmax_scale=softmax_scale,
        attention_chunk=attention_chunk,
        softcap=softcap,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        deterministic=deterministic,
        sm_margin=sm_margin,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        qv=qv,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        page_table=page_table,
        scheduler_metadata=scheduler_metadata,
    )
    sink = one_sink(s_aux, sinks, learnable_sink)
    return attend(options, q, k, v, sink, return_lse=return_attn_probs, out=out)


def flash_attn_qkvpacked_func(
    qkv,
    softmax_scale=None,
    causal=False,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    deterministic=False,
    num_heads_q=None,
    sm_margin=0,
    return_attn_probs=False,
    *,
    s_aux=None,
    sinks=None,
    learnable_sink=None,
):
    """flash_attn_func on views of one tensor; its gradient is one tensor too.

    Args:
        qkv: (b, s, 3, h, d), or with num_heads_q (b, s, num_heads_q + 2 hk, d).
        num_heads_q: number of query heads of the second form.
    """
    return attend_packed(
        make_options(
            causal=causal,
            window_size=window_size,
            softmax_scale=softmax_scale,
            attention_chunk=attention_chunk,
            softcap=softcap,
            deterministic=deterministic,
            sm_margin=sm_margin,
            q_descale=q_descale,
            k_descale=k_descale,
            v_descale=v_descale,
        ),
        None,
        qkv,
        _packed_heads(qkv, num_heads_q, dense_rank=4, name="qkv"),
        one_sink(s_aux, sinks, learnable_sink),
        return_lse=return_attn_probs,
    )


def flash_attn_kvpacked_func(
    q,
    kv,
    *,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
    s_aux=None,
    sinks=None,
    learnable_sink=None,
):
    """flash_attn_func with keys and values in one tensor kv (b, sk, 2, hk, d)."""
    _expect_pair(kv, "kv", 5, 2)
    return attend_packed(
        make_options(
            causal=causal,
            window_size=window_size,
            softmax_scale=softmax_scale,
            attention_chunk=attention_chunk,
            softcap=softcap,
            num_splits=num_splits,
            pack_gqa=pack_gqa,
            deterministic=deterministic,
            sm_margin=sm_margin,
        ),
        tensor(q, "q"),
        kv,
        None,
        one_sink(s_aux, sinks, learnable_sink),
        return_lse=return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv,
    cu_seqlens,
    max_seqlen,
    *,
    num_heads_q=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
    s_aux=None,
    sinks=None,
    learnable_sink=None,
):
    """flash_attn_varlen_func on one tensor; its gradient is one tensor too.

    Args:
        qkv: (total, 3, h, d), or with num_heads_q (total, num_heads_q + 2 hk, d).
        cu_seqlens: (b + 1,) int32, for queries and keys alike.
        max_seqlen: upper bound of the sequence lengths.
        num_heads_q: number of query heads of the second form.

    Returns: out (total, h, d), or (out, softmax_lse (h, total)).
    """
    length = integer(max_seqlen, "max_seqlen")
    return attend_packed(
        make_options(
            causal=causal,
            window_size=window_size,
            softmax_scale=softmax_scale,
            attention_chunk=attention_chunk,
            softcap=softcap,
            num_splits=num_splits,
            pack_gqa=pack_gqa,
            deterministic=deterministic,
            sm_margin=sm_margin,
            cu_seqlens_q=tensor(cu_seqlens, "cu_seqlens"),
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=length,
            max_seqlen_k=length,
        ),
        None,
        qkv,
        _packed_heads(qkv, num_heads_q, dense_rank=3, name="qkv"),
        one_sink(s_aux, sinks, learnable_sink),
        return_lse=return_attn_probs,
    )


def flash_attn_varlen_kvpacked_func(
    q,
    kv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    *,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
    s_aux=None,
    sinks=None,
    learnable_sink=None,
):
    """flash_attn_varlen_func with keys and values in one tensor kv (total_k, 2, hk, d)."""
    _expect_pair(kv, "kv", 4, 2)
    return attend_packed(
        make_options(
            causal=causal,
            window_size=window_size,
            softmax_scale=softmax_scale,
            attention_chunk=attention_chunk,
            softcap=softcap,
            num_splits=num_splits,
            pack_gqa=pack_gqa,
            deterministic=deterministic,
            sm_margin=sm_margin,
            cu_seqlens_q=tensor(cu_seqlens_q, "cu_seqlens_q"),
            cu_seqlens_k=tensor(cu_seqlens_k, "cu_seqlens_k"),
            max_seqlen_q=integer(max_seqlen_q, "max_seqlen_q"),
            max_seqlen_k=integer(max_seqlen_k, "max_seqlen_k"),
        ),
        tensor(q, "q"),
        kv,
        None,
        one_sink(s_aux, sinks, learnable_sink),
        return_lse=return_attn_probs,
    )


def _expect_pair(packed, name: str, rank: int, count: int) -> None:
    tensor(packed, name)
    if packed.dim() != rank or packed.shape[-3] != count:
        raise ValueError(
            f"{name}: expected {rank} dimensions with {count} in the third-last, "
            f"got shape {tuple(packed.shape)}"
        )


def _packed_heads(qkv, num_heads_q, dense_rank: int, name: str) -> tuple[int, ...] | None:
    """Heads of q, k and v along dimension -2, or None for the form (.., 3, h, d)."""
    if num_heads_q is None:
        _expect_pair(qkv, name, dense_rank + 1, 3)
        return None
    heads_q = integer(num_heads_q, "num_heads_q")
    tensor(qkv, name)
    if qkv.dim() != dense_rank:
        raise ValueError(
            f"{name}: expected {dense_rank} dimensions with num_heads_q, got {qkv.dim()}"
        )
    rest = qkv.shape[-2] - heads_q
    if heads_q < 1 or rest < 2 or rest % 2:
        raise ValueError(
            f"num_heads_q: expected the {qkv.shape[-2]} heads of {name} to be num_heads_q plus an "
            f"even number, got {heads_q}"
        )
    return heads_q, rest // 2, rest // 2
