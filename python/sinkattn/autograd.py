# SPDX-License-Identifier: Apache-2.0
"""Gradients. The operators know nothing of autograd; these functions connect them to it.

Two variants of every function: one returns the output alone, so that the common case never meets a
zero-filled gradient of the LSE; the other returns (out, softmax_lse), both differentiable. And both
of them twice: with every option an argument, for tracing, and with few arguments, for speed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

from . import _direct
from ._ops import call, ops

FORWARD = ops.fwd.default
BACKWARD = ops.bwd.default
BACKWARD_OUT = ops.bwd_out.default


class Options(NamedTuple):
    """Everything about a call but q, k, v and the sink, in the order of sinkattn::fwd."""

    qv: torch.Tensor | None
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    seqused_q: torch.Tensor | None
    seqused_k: torch.Tensor | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    page_table: torch.Tensor | None
    cache_batch_idx: torch.Tensor | None
    cache_leftpad: torch.Tensor | None
    q_descale: torch.Tensor | None
    k_descale: torch.Tensor | None
    v_descale: torch.Tensor | None
    softmax_scale: float | None
    causal: bool
    window_left: int
    window_right: int
    attention_chunk: int
    softcap: float
    scheduler_metadata: torch.Tensor | None
    num_splits: int
    pack_gqa: bool | None
    sm_margin: int
    deterministic: bool  # the backward's; last, so that [:-1] are the forward's arguments

    def backward_arguments(self) -> tuple:
        """Arguments of sinkattn::bwd between softmax_lse and need_dq."""
        return (
            *self[1:7],
            self.softmax_scale,
            self.causal,
            self.window_left,
            self.window_right,
            self.attention_chunk,
            self.softcap,
            self.deterministic,
            self.sm_margin,
        )


_NO_OPTION_GRADIENTS = (None,) * len(Options._fields)


def ready(x: torch.Tensor) -> torch.Tensor:
    """The tensor itself if the kernels can read it where it lies, else a contiguous copy.

    They need stride 1 in the last dimension and, on CUDA, no repeated rows and 16-byte alignment.
    """
    if x.dim() == 0:
        return x
    if x.stride(-1) == 1 or x.shape[-1] <= 1:
        if x.is_cpu:
            return x
        if is_compiling() or _aligned(x):
            step = 16 // x.element_size()
            if x.is_contiguous() or all(s > 0 and s % step == 0 for s in x.stride()[:-1]):
                return x
    return x.contiguous() if not x.is_contiguous() else x.clone()


def _aligned(x: torch.Tensor) -> bool:
    """Whether the tensor begins at a multiple of 16 bytes. What a compiler traces (a subclass of
    Tensor) has no address; the operator checks what is handed over later."""
    return type(x) not in (torch.Tensor, torch.nn.Parameter) or x.data_ptr() % 16 == 0


def distinct(options: Options) -> Options:
    """The options with one tensor object per field.

    Self-attention passes one cu_seqlens twice, and Dynamo cannot trace an autograd function that
    receives a tensor in two places. A view is another object and costs nothing once compiled.
    """
    views = (None if x is None else x.view_as(x) for x in options[2:5])
    return Options(*options[:2], *views, *options[5:])


def _save(ctx, tensors, options: Options) -> None:
    # Index tensors are saved like the rest, so that changing them in place is noticed. The other
    # optional tensors do not exist in a backward.
    ctx.save_for_backward(*tensors, *options[1:5])
    nothing = (None,) * 6
    ctx.options = (*options[5:7], *nothing, *options[13:19], None, *options[20:])
    ctx.set_materialize_grads(False)


def _saved(ctx) -> tuple:
    if len(ctx.options) == 5:
        return (*ctx.saved_tensors, dense_options(*ctx.options))
    *tensors, cu_q, cu_k, used_q, used_k = ctx.saved_tensors
    return (*tensors, Options(None, cu_q, cu_k, used_q, used_k, *ctx.options))


def _gradients(ctx, needs, dout, dlse) -> tuple:
    """Gradients of q, k, v and the sink; `needs` says in this order which are wanted."""
    if dout is None and dlse is None:
        return None, None, None, None
    q, k, v, sink, out, lse, options = _saved(ctx)
    gradients = call(
        BACKWARD,
        None if dout is None else ready(dout),
        None if dlse is None else dlse.contiguous(),
        q,
        k,
        v,
        out,
        lse,
        *options.backward_arguments(),
        needs[0],
        needs[1] or needs[2],
        sink if needs[3] else None,
    )
    return tuple(g if need else None for g, need in zip(gradients, needs, strict=True))


class FlashAttnFunc(torch.autograd.Function):
    """(q, k, v, sink, options...) -> out."""

    @staticmethod
    def forward(ctx, q, k, v, sink, *options):
        out, lse = call(FORWARD, q, k, v, *options[:-1], sink)
        _save(ctx, (q, k, v, sink, out, lse), Options(*options))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        return (*_gradients(ctx, ctx.needs_input_grad[:4], dout, None), *_NO_OPTION_GRADIENTS)


class FlashAttnLseFunc(torch.autograd.Function):
    """(q, k, v, sink, options...) -> (out, softmax_lse), the LSE with its gradient."""

    @staticmethod
    def forward(ctx, q, k, v, sink, *options):
        out, lse = call(FORWARD, q, k, v, *options[:-1], sink)
        _save(ctx, (q, k, v, sink, out, lse), Options(*options))
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        return (*_gradients(ctx, ctx.needs_input_grad[:4], dout, dlse), *_NO_OPTION_GRADIENTS)


# --- the same, called eagerly ---------------------------------------------------------------------
# Every argument of apply() costs, tensor or not: FlashAttnFunc's 28 take longer than its operator.
# These have five. They must not be traced, since Dynamo sees no tensors inside a tuple.


def _direct_call(operator):
    """What an operator object calls with the arguments it was given, if this torch names it so."""
    return getattr(operator, "_op", operator)


forward_dense = _direct_call(ops.fwd_dense.default)
forward_dense_no_lse = _direct_call(ops.fwd_dense_no_lse.default)


def dense_options(scale, causal, left, right, deterministic) -> Options:
    nothing = (None,) * 13
    return Options(*nothing, scale, causal, left, right, 0, 0.0, None, 1, None, 0, deterministic)


def _eager_gradients(ctx, dout, dlse) -> tuple:
    return (*_gradients(ctx, ctx.needs_input_grad[:4], dout, dlse), None)


def _eager_forward(ctx, q, k, v, sink, options):
    if type(options) is Options:
        out, lse = call(FORWARD, q, k, v, *options[:-1], sink)
        _save(ctx, (q, k, v, sink, out, lse), options)
    else:
        scale, causal, left, right, _ = options
        out, lse = forward_dense(q, k, v, sink, scale, causal, left, right)
        ctx.save_for_backward(q, k, v, sink, out, lse)
        ctx.options = options
        ctx.set_materialize_grads(False)
    return out, lse


class EagerFunc(torch.autograd.Function):
    """(q, k, v, sink, options) -> out. The options are Options, or for a call without any other
    the tuple (softmax_scale, causal, window_left, window_right, deterministic)."""

    @staticmethod
    def forward(ctx, q, k, v, sink, options):
        return _eager_forward(ctx, q, k, v, sink, options)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        return _eager_gradients(ctx, dout, None)


class EagerLseFunc(torch.autograd.Function):
    """As EagerFunc -> (out, softmax_lse)."""

    @staticmethod
    def forward(ctx, q, k, v, sink, options):
        return _eager_forward(ctx, q, k, v, sink, options)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        return _eager_gradients(ctx, dout, dlse)


def _direct_apply(function):
    """function.apply without torch's Python wrapper, which serves torch.func alone and takes a
    fifth of the whole call. Not to be called while a transform of torch.func is active."""
    return super(torch.autograd.Function, function).apply


apply_eager = _direct_apply(EagerFunc)
apply_eager_lse = _direct_apply(EagerLseFunc)
# Whether vmap, grad or another transform of torch.func is active. A torch without this question
# takes the general path.
in_functorch = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


if _direct.module is not None:

    class DirectFunc(EagerFunc):
        """EagerFunc for the direct entry, which alone calls it: it has asked what must be asked."""

        forward = staticmethod(_direct.module.forward)

        @staticmethod
        def backward(ctx, dout):
            return _direct_gradients(ctx, dout, None) or EagerFunc.backward(ctx, dout)

    class DirectLseFunc(EagerLseFunc):
        """As DirectFunc -> (out, softmax_lse)."""

        forward = staticmethod(_direct.module.forward_lse)

        @staticmethod
        def backward(ctx, dout, dlse):
            return _direct_gradients(ctx, dout, dlse) or EagerLseFunc.backward(ctx, dout, dlse)

    def _direct_gradients(ctx, dout, dlse) -> tuple | None:
        if is_compiling() or torch.is_grad_enabled():  # enabled: with create_graph
            return None
        return _direct.module.backward(
            dout, dlse, ctx.saved_tensors, ctx.options, ctx.needs_input_grad
        )

    _direct.module.connect(_direct_apply(DirectFunc), _direct_apply(DirectLseFunc))


# One function serves dense and packed sequences; FA3 has two names for it.
FlashAttnVarlenFunc = FlashAttnFunc


def split_packed(packed: torch.Tensor, heads: tuple[int, ...] | None) -> tuple[torch.Tensor, ...]:
    """Views of (.., n, h, d) by its third-last dimension, or of (.., sum(heads), d) by heads."""
    if heads is None:
        return packed.unbind(dim=-3)
    return packed.split(heads, dim=-2)


def _packed_gradients(ctx, dout, dlse):
    q, packed, sink, out, lse, options = _saved(ctx)
    dpacked = torch.empty_like(packed, memory_format=torch.contiguous_format)
    parts, dparts = split_packed(packed, ctx.heads), split_packed(dpacked, ctx.heads)
    if q is None:
        (q, k, v), (dq, dk, dv) = parts, dparts
    else:
        (k, v), (dk, dv) = parts, dparts
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    need_sink = ctx.needs_input_grad[2]
    _, dsink = call(
        BACKWARD_OUT,
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
        *options.backward_arguments(),
        True,
        True,
        sink if need_sink else None,
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
        parts = split_packed(packed, heads)
        query, key, value = parts if q is None else (q, *parts)
        out, lse = call(FORWARD, query, key, value, *options[:-1], sink)
        _save(ctx, (q, packed, sink, out, lse), Options(*options))
        ctx.heads = heads
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        if dout is None and dlse is None:
            return (None,) * (4 + len(Options._fields))
        return (*_packed_gradients(ctx, dout, dlse), None, *_NO_OPTION_GRADIENTS)


# --- sinkattn::attention: what an exported training graph contains --------------------------------
# An exporter records operators, not autograd functions, so the gradient must hang on an operator.
# fwd itself stays without one: the Python hop of a registered gradient costs every call that needs
# no gradient about as much as all other host work.

ATTENTION = ops.attention.default


def _attention_context(ctx, inputs, output) -> None:
    q, k, v, *options, sink, deterministic = inputs
    _save(ctx, (q, k, v, sink, *output), Options(*options, deterministic))


_SINK = 3 + len(Options._fields) - 1  # its position in the schema


@once_differentiable
def _attention_backward(ctx, dout, dlse):
    # Arguments that equal their defaults are dropped from the end of a recorded call, and from
    # needs_input_grad with them.
    needs = ctx.needs_input_grad
    need_sink = len(needs) > _SINK and needs[_SINK]
    dq, dk, dv, dsink = _gradients(ctx, (*needs[:3], need_sink), dout, dlse)
    return (dq, dk, dv, *_NO_OPTION_GRADIENTS[:-1], dsink, None)


torch.library.register_autograd(
    "sinkattn::attention", _attention_backward, setup_context=_attention_context
)
