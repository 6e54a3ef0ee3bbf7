# SPDX-License-Identifier: Apache-2.0
"""Attention against a KV cache, and the schedule of a decode step."""

from __future__ import annotations

import torch

from ._arguments import (
    boolean,
    integer,
    one_sink,
    optional_integer,
    optional_tensor,
    refuse_gradient,
    tensor,
    wants_gradient,
    window,
)
from ._execute import attend, make_options
from ._ops import call as call_operator
from ._ops import ops
from .autograd import ready


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    qv=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    page_table=None,
    cu_seqlens_q=None,
    cu_seqlens_k_new=None,
    max_seqlen_q=None,
    rotary_seqlens=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    rotary_interleaved=True,
    scheduler_metadata=None,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
    return_softmax_lse=False,
    *,
    out=None,
    max_seqlen_k=None,
    deterministic=False,
    s_aux=None,
    sinks=None,
    learnable_sink=None,
):
    """Attention of new queries against a KV cache; optionally appends new keys and values first.

    Forward only. Args beyond flash_attn_func:
        q: (b, sq, h, d), or (total_q, h, d) with cu_seqlens_q.
        k_cache, v_cache: (b_k, capacity, hk, ..); with page_table (pages, page_size, hk, ..).
        k, v: new tokens (b, s_new, hk, ..), or (total_new, hk, ..) with cu_seqlens_k_new; written
            in place at slot cache_seqlens + t. Writes past the capacity are dropped.
        rotary_cos, rotary_sin: (seqlen_ro, rotary_dim / 2) in the dtype of q, with new k: rotate
            new keys at position cache_seqlens + t, queries at cache_seqlens + i if causal or
            windowed, else all at cache_seqlens.
        cache_seqlens: int or (b,) int32: used slots, counted from slot 0, before the append.
        cache_batch_idx: (b,) int32: cache row of each sequence.
        cache_leftpad: (b,) int32: first used slot; positions of masks count from it.
        page_table: (b_k, max_pages) int32; any page size; entries past the used length may be -1.
        rotary_seqlens: (b,) int32: position offset used instead of cache_seqlens.
        rotary_interleaved: rotate pairs (0, 1), (2, 3), ..; False: (0, rotary_dim / 2), ...
        num_splits: 0 (heuristic) by default.
        max_seqlen_k, deterministic: accepted for callers that pass the keywords of the varlen
            function; the cache bounds the keys and the forward is always repeatable.
        return_softmax_lse: also return softmax_lse.

    Returns:
        out, or (out, softmax_lse). FlashAttention-3 returns four values in the second case;
        ``out, lse, *rest = ...`` works with both.
    """
    sink = one_sink(s_aux, sinks, learnable_sink)
    q, k_cache, v_cache = tensor(q, "q"), tensor(k_cache, "k_cache"), tensor(v_cache, "v_cache")
    if wants_gradient(q, k_cache, v_cache, k, v, qv, sink):
        refuse_gradient("k_cache")
    boolean(deterministic, "deterministic")
    optional_integer(max_seqlen_k, "max_seqlen_k")
    seqlens = _cache_seqlens(cache_seqlens, q, cu_seqlens_q)
    longest_q = optional_integer(max_seqlen_q, "max_seqlen_q")
    if cu_seqlens_q is not None and longest_q is None:
        longest_q = q.shape[0]
    options = make_options(
        causal=causal,
        window_size=window_size,
        softmax_scale=softmax_scale,
        attention_chunk=attention_chunk,
        softcap=softcap,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        sm_margin=sm_margin,
        cu_seqlens_q=cu_seqlens_q,
        seqused_k=seqlens,
        max_seqlen_q=longest_q,
        qv=qv,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        page_table=page_table,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        scheduler_metadata=scheduler_metadata,
    )
    if (k is None) != (v is None):
        raise ValueError("k: expected new k and v together, got one of them")
    if k is None:
        for name, value in (
            ("rotary_cos", rotary_cos),
            ("rotary_sin", rotary_sin),
            ("rotary_seqlens", rotary_seqlens),
            ("cu_seqlens_k_new", cu_seqlens_k_new),
        ):
            if value is not None:
                raise ValueError(f"{name}: expected new k and v with it, got neither")
        if k_cache.stride(-1) != 1 or v_cache.stride(-1) != 1:
            raise ValueError("k_cache: expected stride 1 in the last dimension, got another")
        return attend(options, q, k_cache, v_cache, sink, return_lse=return_softmax_lse, out=out)
    if seqlens is None:
        raise ValueError("cache_seqlens: expected the used lengths with new k and v, got none")
    q = ready(q)
    result = (
        q.new_empty(_out_shape(q, v_cache), dtype=_out_dtype(q))
        if out is None
        else tensor(out, "out")
    )
    lse = call_operator(
        ops.fwd_kvcache.default,
        result,
        q,
        k_cache,
        v_cache,
        ready(tensor(k, "k")),
        ready(tensor(v, "v")),
        optional_tensor(cu_seqlens_k_new, "cu_seqlens_k_new"),
        optional_tensor(rotary_cos, "rotary_cos"),
        optional_tensor(rotary_sin, "rotary_sin"),
        optional_tensor(rotary_seqlens, "rotary_seqlens"),
        boolean(rotary_interleaved, "rotary_interleaved"),
        *options[:-1],
        sink,
    )
    return (result, lse) if return_softmax_lse else result


def _cache_seqlens(cache_seqlens, q, cu_seqlens_q) -> torch.Tensor | None:
    if cache_seqlens is None or isinstance(cache_seqlens, torch.Tensor):
        return cache_seqlens
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    length = integer(cache_seqlens, "cache_seqlens")
    return torch.full((batch,), length, dtype=torch.int32, device=q.device)


def _out_shape(q, v) -> tuple[int, ...]:
    return (*q.shape[:-1], v.shape[-1])


def _out_dtype(q) -> torch.dtype:
    return torch.bfloat16 if q.dtype == torch.float8_e4m3fn else q.dtype


def get_scheduler_metadata(
    batch_size,
    max_seqlen_q,
    max_seqlen_k,
    num_heads_q,
    num_heads_kv,
    headdim,
    cache_seqlens,
    qkv_dtype=torch.bfloat16,
    headdim_v=None,
    cu_seqlens_q=None,
    cu_seqlens_k_new=None,
    cache_leftpad=None,
    page_size=None,
    max_seqlen_k_new=0,
    causal=False,
    window_size=(-1, -1),
    attention_chunk=0,
    has_softcap=False,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
):
    """Schedule of a decode step, computed once and read by every layer.

    Args: the facts of the later flash_attn_with_kvcache call.
        batch_size, max_seqlen_q, max_seqlen_k: number of sequences and upper bounds of their query
            and key lengths (tokens).
        num_heads_q, num_heads_kv: heads of q and of the cache.
        headdim, headdim_v: head dims of k and v; headdim_v defaults to headdim.
        cache_seqlens: (b,) int32 used slots; its device is that of the result.
        qkv_dtype: dtype of q, k and v.
        cu_seqlens_q, cu_seqlens_k_new: (b + 1,) int32 of packed queries and of packed new keys.
        cache_leftpad: (b,) int32.
        page_size: slots per page of a paged cache, None for a dense one.
        max_seqlen_k_new: upper bound of the new keys per sequence.
        causal, window_size, attention_chunk, num_splits, pack_gqa, sm_margin: as there.
        has_softcap: whether softcap is on there.

    Returns:
        Opaque int32 vector; its length depends on batch_size alone and is at most
        4 * round_up(batch_size, 4) + 1. It is never written again, so that one vector serves all
        layers and streams.

    Raises ValueError for sizes out of range and TypeError for index tensors that are not int32.
    """
    left, right = window(window_size)
    return call_operator(
        ops.get_scheduler_metadata,
        integer(batch_size, "batch_size"),
        integer(max_seqlen_q, "max_seqlen_q"),
        integer(max_seqlen_k, "max_seqlen_k"),
        integer(num_heads_q, "num_heads_q"),
        integer(num_heads_kv, "num_heads_kv"),
        integer(headdim, "headdim"),
        integer(headdim if headdim_v is None else headdim_v, "headdim_v"),
        qkv_dtype,
        tensor(cache_seqlens, "cache_seqlens"),
        optional_tensor(cu_seqlens_q, "cu_seqlens_q"),
        optional_tensor(cu_seqlens_k_new, "cu_seqlens_k_new"),
        optional_tensor(cache_leftpad, "cache_leftpad"),
        optional_integer(page_size, "page_size"),
        integer(max_seqlen_k_new, "max_seqlen_k_new"),
        boolean(causal, "causal"),
        left,
        right,
        0 if attention_chunk is None else integer(attention_chunk, "attention_chunk"),
        boolean(has_softcap, "has_softcap"),
        integer(num_splits, "num_splits"),
        None if pack_gqa is None else boolean(pack_gqa, "pack_gqa"),
        integer(sm_margin, "sm_margin"),
    )
