# SPDX-License-Identifier: Apache-2.0
"""From Python arguments to the operator: with or without autograd."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import torch
from torch.compiler import is_compiling

from . import _direct
from ._arguments import boolean, integer, number, optional_tensor, refuse_gradient, tensor, window
from ._ops import call, ops
from .autograd import (
    ATTENTION,
    FORWARD,
    FlashAttnFunc,
    FlashAttnLseFunc,
    FlashAttnQKVPackedFunc,
    Options,
    apply_eager,
    apply_eager_lse,
    distinct,
    forward_dense,
    forward_dense_no_lse,
    in_functorch,
    ready,
    split_packed,
)

# Set while explain() runs a public function: the plan is reported instead of run.
_explaining: contextvars.ContextVar[bool] = contextvars.ContextVar("explaining", default=False)


class Explained(Exception):
    """Carries the plan text out of a public function."""


@contextlib.contextmanager
def explaining() -> Iterator[None]:
    token = _explaining.set(True)
    if _direct.module is not None:
        _direct.module.pause(1)
    try:
        yield
    finally:
        if _direct.module is not None:
            _direct.module.pause(-1)
        _explaining.reset(token)


def make_options(
    *,
    causal,
    window_size,
    softmax_scale=None,
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    seqused_q=None,
    seqused_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    page_table=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    scheduler_metadata=None,
) -> Options:
    """The options of one call, with the types that the operator schema wants."""
    left, right = window(window_size)
    return Options(
        optional_tensor(qv, "qv"),
        optional_tensor(cu_seqlens_q, "cu_seqlens_q"),
        optional_tensor(cu_seqlens_k, "cu_seqlens_k"),
        optional_tensor(seqused_q, "seqused_q"),
        optional_tensor(seqused_k, "seqused_k"),
        None if max_seqlen_q is None else integer(max_seqlen_q, "max_seqlen_q"),
        None if max_seqlen_k is None else integer(max_seqlen_k, "max_seqlen_k"),
        optional_tensor(page_table, "page_table"),
        optional_tensor(cache_batch_idx, "cache_batch_idx"),
        optional_tensor(cache_leftpad, "cache_leftpad"),
        optional_tensor(q_descale, "q_descale"),
        optional_tensor(k_descale, "k_descale"),
        optional_tensor(v_descale, "v_descale"),
        None if softmax_scale is None else number(softmax_scale, "softmax_scale"),
        boolean(causal, "causal"),
        left,
        right,
        0 if attention_chunk is None else integer(attention_chunk, "attention_chunk"),
        number(softcap, "softcap"),
        optional_tensor(scheduler_metadata, "scheduler_metadata"),
        integer(num_splits, "num_splits"),
        None if pack_gqa is None else boolean(pack_gqa, "pack_gqa"),
        integer(sm_margin, "sm_margin"),
        boolean(deterministic, "deterministic"),
    )


# Options without a gradient, by position in Options.
_FORWARD_ONLY = [
    (Options._fields.index(name), name)
    for name in ("qv", "page_table", "cache_batch_idx", "cache_leftpad")
]


def _refuse_gradients(q, options: Options, out) -> None:
    """Raises where a gradient is wanted and an option of this call has none."""
    if out is not None:
        raise ValueError("out: expected None where an input requires grad, got a tensor")
    for position, name in _FORWARD_ONLY:
        if options[position] is not None:
            refuse_gradient(name)
    if q.dtype == torch.float8_e4m3fn:
        refuse_gradient("q")
    if options.sm_margin > 0 and q.is_cuda:  # the backward's core says the same, but later
        refuse_gradient("sm_margin")


def _needs_gradient(q, k, v, sink, options: Options) -> bool:
    if not torch.is_grad_enabled():
        return False
    if q.requires_grad or k.requires_grad or v.requires_grad:
        return True
    if sink is not None and sink.requires_grad:
        return True
    return options.qv is not None and options.qv.requires_grad


def attend(options: Options, q, k, v, sink, *, return_lse, out=None):
    """out, or (out, softmax_lse)."""
    q, k, v = ready(tensor(q, "q")), ready(tensor(k, "k")), ready(tensor(v, "v"))
    if options.qv is not None:
        options = options._replace(qv=ready(options.qv))
    tracing = is_compiling()
    if not tracing and _explaining.get():
        raise Explained(call(ops.explain_fwd, q, k, v, *options[:-1], sink))
    if _needs_gradient(q, k, v, sink, options):
        _refuse_gradients(q, options, optional_tensor(out, "out"))
        if tracing:
            if torch.compiler.is_exporting():
                out, lse = ATTENTION(q, k, v, *options[:-1], sink, options.deterministic)
                return (out, lse) if return_lse else out
            k, v, options = k.view_as(k), v.view_as(v), distinct(options)
        elif not in_functorch():
            apply = apply_eager_lse if return_lse else apply_eager
            return apply(q, k, v, sink, options)
        function = FlashAttnLseFunc if return_lse else FlashAttnFunc
        return function.apply(q, k, v, sink, *options)
    if out is None:
        out, lse = call(FORWARD, q, k, v, *options[:-1], sink)
    else:
        lse = call(ops.fwd_out.default, tensor(out, "out"), q, k, v, *options[:-1], sink)
    return (out, lse) if return_lse else out


def attend_dense(q, k, v, sink, softmax_scale, causal, window_size, deterministic, return_lse):
    """attend() for a call with no other option, at a fraction of its cost; None where the call is
    anything but plain, or fails: then attend() decides, and its errors are the ones raised."""
    if is_compiling() or _explaining.get() or in_functorch():
        return None
    if type(window_size) is not tuple or len(window_size) != 2:
        return None
    left, right = window_size
    # Exact types, so that nothing needs converting. A sink is mostly a Parameter.
    if not (
        type(q) is type(k) is type(v) is torch.Tensor
        and (sink is None or isinstance(sink, torch.Tensor))
        and type(left) is type(right) is int
        and (softmax_scale is None or type(softmax_scale) is float)
        and type(causal) is type(deterministic) is bool
    ):
        return None
    try:
        if torch.is_grad_enabled() and (
            q.requires_grad
            or k.requires_grad
            or v.requires_grad
            or (sink is not None and sink.requires_grad)
        ):
            if q.dtype is torch.float8_e4m3fn:
                return None
            apply = apply_eager_lse if return_lse else apply_eager
            return apply(q, k, v, sink, (softmax_scale, causal, left, right, deterministic))
        forward = forward_dense if return_lse else forward_dense_no_lse
        return forward(q, k, v, sink, softmax_scale, causal, left, right)
    except RuntimeError:
        return None


def attend_packed(options: Options, q, packed, heads, sink, *, return_lse):
    """As attend, with keys and values (and queries where q is None) in one tensor, whose gradient
    is one tensor too."""
    tracing = is_compiling()
    one_gradient = (
        _needs_gradient(packed if q is None else q, packed, packed, sink, options)
        and not (tracing and torch.compiler.is_exporting())
        and not any(
            x is not None for x in (options.q_descale, options.k_descale, options.v_descale)
        )
    )
    if not one_gradient:
        parts = split_packed(packed, heads)
        query, key, value = parts if q is None else (q, *parts)
        return attend(options, query, key, value, sink, return_lse=return_lse)
    query = packed if q is None else q
    _refuse_gradients(query, options, None)
    if tracing:
        options = distinct(options)
    out, lse = FlashAttnQKVPackedFunc.apply(
        None if q is None else ready(q), ready(packed), sink, heads, *options
    )
    return (out, lse) if return_lse else out
