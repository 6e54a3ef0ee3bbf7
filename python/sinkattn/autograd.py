# SPDX-License-Identifier: Apache-2.0
"""Gradients. The operators know nothing of autograd; these functions connect them to it.

Two variants of every function: one returns the output alone, so that the common case never meets a
zero-filled gradient of the LSE; the other returns (out, softmax_lse), both differentiable.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ._ops import call, ops


class Options(NamedTuple):
    """Everything about a differentiable call that is not a differentiable tensor."""

    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    seqused_q: torch.Tensor | None
    seqused_k: torch.Tensor | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    softmax_scale: float | None
    causal: bool
    window_left: int
    window_right: int
    attention_chunk: int
    softcap: float
    num_splits: int
    pack_gqa: bool | None
    deterministic: bool
    sm_margin: int


def ready(x: torch.Tensor) -> torch.Tensor:
    """The tensor itself if the kernels can read it where it lies, else a contiguous copy.

    They need stride 1 in the last dimension, no repeated rows and, on CUDA, 16-byte alignment.
    """
    if x.dim() == 0:
        return x
    if x.stride(-1) == 1 or x.shape[-1] <= 1:
        if x.is_cpu or torch.compiler.is_compiling():
            return x
        step = 16 // x.element_size()
        aligned = x.data_ptr() % 16 == 0
        if aligned and all(s > 0 and s % step == 0 for s in x.stride()[:-1]):
            return x
        if aligned and x.is_contiguous():
            return x
    return x.contiguous() if not x.is_contiguous() else x.clone()


def forward_options(o: Options) -> dict:
    """Keyword arguments of sinkattn::fwd."""
    return {
        "cu_seqlens_q": o.cu_seqlens_q,
        "cu_seqlens_k": o.cu_seqlens_k,
        "seqused_q": o.seqused_q,
        "seqused_k": o.seqused_k,
        "max_seqlen_q": o.max_seqlen_q,
        "max_seqlen_k": o.max_seqlen_k,
        "softmax_scale": o.softmax_scale,
        "causal": o.causal,
        "window_left": o.window_left,
        "window_right": o.window_right,
        "attention_chunk": o.attention_chunk,
        "softcap": o.softcap,
        "num_splits": o.num_splits,
        "pack_gqa": o.pack_gqa,
        "sm_margin": o.sm_margin,
    }


def backward_options(o: Options) -> dict:
    """Keyword arguments of sinkattn::bwd and bwd_out."""
    options = forward_options(o)
    del options["num_splits"], options["pack_gqa"]
    options["deterministic"] = o.deterministic
    return options


def _save(ctx, q, k, v, sink, out, lse, options: Options) -> None:
    # Index tensors are saved like the rest, so that changing them in place is noticed.
    ctx.save_for_backward(q, k, v, sink, out, lse, *options[:4])
    ctx.options = options[4:]


def _saved(ctx):
    q, k, v, sink, out, lse, *index = ctx.saved_tensors
    return q, k, v, sink, out, lse, Options(*index, *ctx.options)


def _gradients(ctx, dout, dlse):
    q, k, v, sink, out, lse, options = _saved(ctx)
    need_q, need_k, need_v, need_sink = ctx.needs_input_grad[:4]
    if dout is None and dlse is None:
        return None, None, None, None
    dq, dk, dv, dsink = call(
        ops.bwd,
        None if dout is None else ready(dout),
        None if dlse is None else dlse.contiguous(),
        q,
        k,
        v,
        out,
        lse,
        need_dq=need_q,
        need_dkv=need_k or need_v,
        learnable_sink=sink if need_sink else None,
        **backward_options(options),
    )
    return (
        dq if need_q else None,
        dk if need_k else None,
        dv if need_v else None,
        dsink if need_sink else None,
    )


class FlashAttnFunc(torch.autograd.Function):
    """(q, k, v, sink, options...) -> out."""

    @staticmethod
    def forward(ctx, q, k, v, sink, *options):
        options = Options(*options)
        out, lse = call(ops.fwd, q, k, v, learnable_sink=sink, **forward_options(options))
        _save(ctx, q, k, v, sink, out, lse, options)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        return (*_gradients(ctx, dout, None), *(None,) * len(Options._fields))


class FlashAttnLseFunc(torch.autograd.Function):
    """(q, k, v, sink, options...) -> (out, softmax_lse), the LSE with its gradient."""

    @staticmethod
    def forward(ctx, q, k, v, sink, *options):
        options = Options(*options)
        out, lse = call(ops.fwd, q, k, v, learnable_sink=sink, **forward_options(options))
        _save(ctx, q, k, v, sink, out, lse, options)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        return (*_gradients(ctx, dout, dlse), *(None,) * len(Options._fields))


# One function serves dense and packed sequences; FA3 has two names for it.
FlashAttnVarlenFunc = FlashAttnFunc


def split_packed(packed: torch.Tensor, heads: tuple[int, ...] | None) -> tuple[torch.Tensor, ...]:
    """Views of (.., n, h, d) by its third-last dimension, or of (.., sum(heads), d) by heads."""
    if heads is None:
        return packed.unbind(dim=-3)
    return packed.split(heads, dim=-2)


def _packed_gradients(ctx, dout, dlse):
    q, packed, sink, out, lse, *index = ctx.saved_tensors
    options = Options(*index, *ctx.options)
    dpacked = torch.empty_like(packed, memory_format=torch.contiguous_format)
    parts, dparts = split_packed(packed, ctx.heads), split_packed(dpacked, ctx.heads)
    if q is None:
        (q, k, v), (dq, dk, dv) = parts, dparts
    else:
        (k, v), (dk, dv) = parts, dparts
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    need_sink = ctx.needs_input_grad[2]
    _, dsink = call(
        ops.bwd_out,
        dq,
        dk,
        dv,
        None if dout is None else ready(dout),
        None if dlse is None else dlse.contiguous(),
        q,
        k,
        v,
        out,
        lse,
        learnable_sink=sink if need_sink else None,
        **backward_options(options),
    )
    return (
        dq if ctx.needs_input_grad[0] else None,
        dpacked if ctx.needs_input_grad[1] else None,
        dsink if need_sink else None,
    )


class FlashAttnQKVPackedFunc(torch.autograd.Function):
    """(q or None, packed, sink, heads, options...) -> (out, softmax_lse); one packed gradient."""

    @staticmethod
    def forward(ctx, q, packed, sink, heads, *options):
        options = Options(*options)
        parts = split_packed(packed, heads)
        query, key, value = parts if q is None else (q, *parts)
        out, lse = call(ops.fwd, query, key, value, learnable_sink=sink, **forward_options(options))
        ctx.save_for_backward(q, packed, sink, out, lse, *options[:4])
        ctx.options = options[4:]
        ctx.heads = heads
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        if dout is None and dlse is None:
            return (None,) * (4 + len(Options._fields))
        return (*_packed_gradients(ctx, dout, dlse), *(None,) * (1 + len(Options._fields)))
