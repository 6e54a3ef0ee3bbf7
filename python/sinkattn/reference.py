# SPDX-License-Identifier: Apache-2.0
"""Attention in eager torch, written from the definition and sharing no code with the kernels.

Slow, differentiable, for checking. The sink is an extra column of the score matrix that is dropped
after the softmax.
"""

from __future__ import annotations

import torch

from ._arguments import one_sink, window


def attention_reference(
    q,
    k,
    v,
    *,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    seqused_q=None,
    seqused_k=None,
    qv=None,
    page_table=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    compute_dtype=torch.float64,
    s_aux=None,
    sinks=None,
    learnable_sink=None,
):
    """Reference of every attention function; arguments as in flash_attn_varlen_func.

    Args beyond that: compute_dtype, the dtype of all arithmetic (out and LSE come in it). With the
    dtype of q it shows the error of a same-precision implementation.

    Returns:
        (out, softmax_lse), differentiable; rows that belong to no sequence are 0 and -inf.
    """
    sink = one_sink(s_aux, sinks, learnable_sink)
    heads, dv = q.shape[-2], v.shape[-1]
    scale = softmax_scale
    if scale is None:
        scale = (q.shape[-1] + (dv if qv is not None else 0)) ** -0.5
    left, right = window(window_size)
    packed_q = cu_seqlens_q is not None
    batch = cu_seqlens_q.numel() - 1 if packed_q else q.shape[0]
    q_flat = q if packed_q else q.flatten(0, 1)
    qv_flat = None if qv is None else (qv if packed_q else qv.flatten(0, 1))
    rows_total = q_flat.shape[0]
    outs, lses, places = [], [], []
    for b in range(batch):
        start, length = _query_rows(b, q, cu_seqlens_q, seqused_q)
        rows = slice(start, start + length)
        key, value = _keys(
            b, k, v, cu_seqlens_k, seqused_k, page_table, cache_batch_idx, cache_leftpad
        )
        factor = scale
        key_scale = value_scale = None
        if q_descale is not None or k_descale is not None:
            key_scale = torch.ones(key.shape[1], dtype=compute_dtype, device=q.device)
            for descale in (q_descale, k_descale):
                if descale is not None:
                    key_scale = key_scale * descale[b].to(compute_dtype)
        if v_descale is not None:
            value_scale = v_descale[b].to(compute_dtype)
        out, lse = _one_sequence(
            q_flat[rows].to(compute_dtype),
            None if qv_flat is None else qv_flat[rows].to(compute_dtype),
            key.to(compute_dtype),
            value.to(compute_dtype),
            key_scale,
            value_scale,
            factor,
            _visible(length, key.shape[0], causal, left, right, attention_chunk, q.device),
            softcap,
            None if sink is None else sink.to(compute_dtype),
        )
        outs.append(out)
        lses.append(lse)
        places.append(torch.arange(start, start + length, device=q.device))
    place = torch.cat(places) if places else torch.zeros(0, dtype=torch.long, device=q.device)
    out = q.new_zeros((rows_total, heads, dv), dtype=compute_dtype)
    lse = q.new_full((heads, rows_total), float("-inf"), dtype=compute_dtype)
    if outs:
        out = out.index_copy(0, place, torch.cat(outs))
        lse = lse.index_copy(1, place, torch.cat(lses, dim=1))
    if packed_q:
        return out, lse
    shape = q.shape[:2]
    return out.unflatten(0, shape), lse.unflatten(1, shape).transpose(0, 1)


def _query_rows(b, q, cu_seqlens_q, seqused_q):
    """First flattened row and number of rows of sequence b."""
    if cu_seqlens_q is None:
        start, length = b * q.shape[1], q.shape[1]
    else:
        start, end = int(cu_seqlens_q[b]), int(cu_seqlens_q[b + 1])
        length = end - start
    if seqused_q is not None:
        length = min(length, int(seqused_q[b]))
    return start, length


def _keys(b, k, v, cu_seqlens_k, seqused_k, page_table, cache_batch_idx, cache_leftpad):
    """Keys and values of sequence b, (sk, hk, ..)."""
    row = b if cache_batch_idx is None else int(cache_batch_idx[b])
    if cu_seqlens_k is not None:
        rows = slice(int(cu_seqlens_k[b]), int(cu_seqlens_k[b + 1]))
        key, value = k[rows], v[rows]
    elif page_table is not None:
        size = k.shape[1]
        pages = page_table[row, : -(-int(seqused_k[b]) // size)].long()
        key, value = k[pages].flatten(0, 1), v[pages].flatten(0, 1)
    else:
        key, value = k[row], v[row]
    if seqused_k is not None:
        used = int(seqused_k[b])
        key, value = key[:used], value[:used]
    if cache_leftpad is not None:
        pad = int(cache_leftpad[b])
        key, value = key[pad:], value[pad:]
    return key, value


def _visible(sq, sk, causal, left, right, chunk, device):
    """(sq, sk) bool: key j is visible to row i."""
    position = torch.arange(sq, device=device)[:, None] + (sk - sq)
    column = torch.arange(sk, device=device)[None, :]
    visible = torch.ones(sq, sk, dtype=torch.bool, device=device)
    if causal:
        visible &= column <= position
    elif right >= 0:
        visible &= column <= position + right
    if left >= 0:
        visible &= column >= position - left
    if chunk > 0:
        chunk_of = torch.div(position, chunk, rounding_mode="floor")
        visible &= torch.div(column, chunk, rounding_mode="floor") == chunk_of
    return visible


def _one_sequence(q, qv, k, v, key_scale, value_scale, scale, visible, softcap, sink):
    """q (sq, h, d), k (sk, hk, d), v (sk, hk, dv) -> out (sq, h, dv), lse (h, sq)."""
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, dim=1)
    v = v.repeat_interleave(group, dim=1)
    scores = torch.einsum("ihd,jhd->hij", q, k)
    if qv is not None:
        scores = scores + torch.einsum("ihd,jhd->hij", qv, v)
    scores = scores * scale
    if key_scale is not None:
        scores = scores * key_scale.repeat_interleave(group)[:, None, None]
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sink is not None:
        column = sink[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, column], dim=-1)
    if scores.shape[-1] == 0:
        empty = torch.full(scores.shape[:-1], float("-inf"), dtype=q.dtype, device=q.device)
        return q.new_zeros((q.shape[0], q.shape[1], v.shape[-1])), empty
    hopeless = (scores == float("-inf")).all(dim=-1, keepdim=True)
    safe = torch.where(hopeless, 0.0, scores)
    lse = torch.logsumexp(safe, dim=-1)
    weights = torch.where(hopeless, 0.0, torch.softmax(safe, dim=-1))
    if sink is not None:
        weights = weights[..., :-1]
    out = torch.einsum("hij,jhd->ihd", weights, v)
    if value_scale is not None:
        out = out * value_scale.repeat_interleave(group)[None, :, None]
    return out, torch.where(hopeless.squeeze(-1), float("-inf"), lse)
