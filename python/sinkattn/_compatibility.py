# SPDX-License-Identifier: Apache-2.0
"""Private names of FlashAttention-3 that other programs import. Not part of the public API."""

from __future__ import annotations

import torch

from ._arguments import one_sink, optional_integer, window
from ._cache import flash_attn_with_kvcache
from ._execute import attend, make_options
from ._ops import call as call_operator
from ._ops import ops
from .autograd import ready


def maybe_contiguous(x):
    """x with stride 1 in its last dimension; None stays None."""
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x


def round_multiple(x, m):
    """x rounded up to a multiple of m."""
    return (x + m - 1) // m * m


def round_up_headdim(head_size: int) -> int:
    """The head dim that a kernel of FlashAttention-3 would be compiled for."""
    for size in (64, 96, 128, 192, 256):
        if head_size <= size:
            return size
    return 256


def _sides(window_size, left, right) -> tuple[int, int]:
    return window((left, right) if window_size is None else window_size)


@torch.no_grad()
def _flash_attn_forward(
    q,
    k,
    v,
    k_new=None,
    v_new=None,
    qv=None,
    out_=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    cu_seqlens_k_new=None,
    seqused_q=None,
    seqused_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    page_table=None,
    kv_batch_idx=None,
    leftpad_k=None,
    rotary_cos=None,
    rotary_sin=None,
    seqlens_rotary=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    softmax_scale=None,
    causal=False,
    window_size_left=-1,
    window_size_right=-1,
    attention_chunk=0,
    softcap=0.0,
    rotary_interleaved=True,
    scheduler_metadata=None,
    num_splits=1,
    pack_gqa=None,
    sm_margin=0,
    *,
    out=None,
    window_size=None,
    s_aux=None,
    sinks=None,
    learnable_sink=None,
):
    """(out, softmax_lse, empty, empty), without autograd. `out` and `window_size` are the older
    spellings of `out_` and the two window sides."""
    sink = one_sink(s_aux, sinks, learnable_sink)
    sides = _sides(window_size, window_size_left, window_size_right)
    target = out_ if out is None else out
    nothing = torch.empty(0, device=q.device)
    if k_new is not None or v_new is not None:
        for name, value in (
            ("cu_seqlens_k", cu_seqlens_k),
            ("seqused_q", seqused_q),
        ):
            if value is not None:
                raise NotImplementedError(f"{name}: expected None with k_new, got a tensor")
        result, lse = flash_attn_with_kvcache(
            q, k, v, k_new, v_new, qv, rotary_cos, rotary_sin, seqused_k, kv_batch_idx, leftpad_k,
            page_table, cu_seqlens_q, cu_seqlens_k_new, max_seqlen_q, seqlens_rotary, q_descale,
            k_descale, v_descale, softmax_scale, causal, sides, attention_chunk, softcap,
            rotary_interleaved, scheduler_metadata, num_splits, pack_gqa, sm_margin, True,
            out=target, learnable_sink=sink,
        )  # fmt: skip
        return result, lse, nothing, nothing
    if rotary_cos is not None or rotary_sin is not None:
        raise ValueError("rotary_cos: expected k_new and v_new with it, got neither")
    options = make_options(
        causal=causal,
        window_size=sides,
        softmax_scale=softmax_scale,
        attention_chunk=attention_chunk,
        softcap=softcap,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        sm_margin=sm_margin,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        qv=qv,
        page_table=page_table,
        cache_batch_idx=kv_batch_idx,
        cache_leftpad=leftpad_k,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        scheduler_metadata=scheduler_metadata,
    )
    result, lse = attend(options, q, k, v, sink, return_lse=True, out=target)
    return result, lse, nothing, nothing


@torch.no_grad()
def _flash_attn_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    sequed_q=None,
    sequed_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    dq=None,
    dk=None,
    dv=None,
    softmax_scale=None,
    is_causal=False,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    deterministic=False,
    sm_margin=0,
    *,
    causal=None,
    window_size=None,
    dlse=None,
    s_aux=None,
    sinks=None,
    learnable_sink=None,
):
    """Fills dq, dk, dv and returns softmax_d; with a sink (softmax_d, dsink). `sequed_*` is the
    upstream spelling; `causal` and `window_size` are the older ones."""
    sink = one_sink(s_aux, sinks, learnable_sink)
    left, right = _sides(window_size, window_size_left, window_size_right)
    if (dk is None) != (dv is None):
        raise ValueError("dk: expected dk and dv together, got one of them")
    for name, gradient in (("dq", dq), ("dk", dk), ("dv", dv)):
        if gradient is not None and gradient.stride(-1) != 1:
            raise ValueError(f"{name}: expected stride 1 in the last dimension, got another")
    nothing = q.new_empty(0)
    softmax_d, dsink = call_operator(
        ops.bwd_out,
        nothing if dq is None else dq,
        nothing if dk is None else dk,
        nothing if dv is None else dv,
        None if dout is None else ready(dout),
        dlse,
        ready(q),
        ready(k),
        ready(v),
        ready(out),
        softmax_lse,
        cu_seqlens_q,
        cu_seqlens_k,
        sequed_q,
        sequed_k,
        optional_integer(max_seqlen_q, "max_seqlen_q"),
        optional_integer(max_seqlen_k, "max_seqlen_k"),
        softmax_scale,
        is_causal if causal is None else causal,
        left,
        right,
        0,
        softcap,
        deterministic,
        sm_margin,
        dq is not None,
        dk is not None,
        sink,
    )
    return softmax_d if sink is None else (softmax_d, dsink)
