# SPDX-License-Identifier: Apache-2.0
"""From checked Python arguments to the operator: with or without autograd."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import torch

from ._arguments import boolean, integer, number, refuse_gradient, tensor, wants_gradient
from ._ops import call as call_operator
from ._ops import ops
from .autograd import FlashAttnFunc, FlashAttnLseFunc, Options, forward_options, ready

# Set while explain() runs a public function: the plan is reported instead of run.
_explaining: contextvars.ContextVar[bool] = contextvars.ContextVar("explaining", default=False)


class Explained(Exception):
    """Carries the plan text out of a public function."""


@contextlib.contextmanager
def explaining() -> Iterator[None]:
    token = _explaining.set(True)
    try:
        yield
    finally:
        _explaining.reset(token)


# Arguments that exist in the forward alone, with the name a refusal gives them.
_FORWARD_ONLY = ("qv", "page_table", "cache_batch_idx", "cache_leftpad")


class Call:
    """The options of one call, validated as far as Python can."""

    __slots__ = ("_extras", "_options", "out")

    def __init__(
        self,
        *,
        causal,
        window,
        softmax_scale=None,
        attention_chunk=0,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        seqused_q=None,
        seqused_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
    ):
        for name, value in (
            ("cu_seqlens_q", cu_seqlens_q),
            ("cu_seqlens_k", cu_seqlens_k),
            ("seqused_q", seqused_q),
            ("seqused_k", seqused_k),
        ):
            if value is not None:
                tensor(value, name)
        self._options = Options(
            cu_seqlens_q,
            cu_seqlens_k,
            seqused_q,
            seqused_k,
            max_seqlen_q,
            max_seqlen_k,
            None if softmax_scale is None else number(softmax_scale, "softmax_scale"),
            causal,
            window[0],
            window[1],
            0 if attention_chunk is None else integer(attention_chunk, "attention_chunk"),
            number(softcap, "softcap"),
            integer(num_splits, "num_splits"),
            None if pack_gqa is None else boolean(pack_gqa, "pack_gqa"),
            boolean(deterministic, "deterministic"),
            integer(sm_margin, "sm_margin"),
        )
        self._extras: dict[str, torch.Tensor] = {}
        self.out: torch.Tensor | None = None

    def extras(self, *, out=None, **tensors) -> Call:
        """Optional tensors that the autograd functions do not carry."""
        for name, value in tensors.items():
            if value is not None:
                self._extras[name] = tensor(value, name)
        if out is not None:
            self.out = tensor(out, "out")
        return self

    def options(self) -> Options:
        return self._options

    @property
    def forward_only(self) -> bool:
        return bool(self._extras) or self.out is not None

    def operator_options(self) -> dict:
        return forward_options(self._options) | self._extras

    def refuse_gradients(self, q) -> None:
        """Raises where a gradient is wanted and an option of this call has none."""
        if self.out is not None:
            raise ValueError("out: expected None where an input requires grad, got a tensor")
        for name in _FORWARD_ONLY:
            if name in self._extras:
                refuse_gradient(name)
        if q.dtype == torch.float8_e4m3fn:
            refuse_gradient("q")


def attend(call: Call, q, k, v, sink, *, return_lse):
    """out, or (out, softmax_lse)."""
    q, k, v = ready(tensor(q, "q")), ready(tensor(k, "k")), ready(tensor(v, "v"))
    if call._extras.get("qv") is not None:
        call._extras["qv"] = ready(call._extras["qv"])
    if not torch.compiler.is_compiling() and _explaining.get():
        raise Explained(
            call_operator(ops.explain_fwd, q, k, v, learnable_sink=sink, **call.operator_options())
        )
    if wants_gradient(q, k, v, sink, call._extras.get("qv")):
        call.refuse_gradients(q)
        if "scheduler_metadata" in call._extras or any(n.endswith("descale") for n in call._extras):
            # Checked like any forward; the metadata changes no result, descales need e4m3.
            call_operator(ops.explain_fwd, q, k, v, learnable_sink=sink, **call.operator_options())
        function = FlashAttnLseFunc if return_lse else FlashAttnFunc
        return function.apply(q, k, v, sink, *call.options())
    options = call.operator_options()
    if call.out is None:
        out, lse = call_operator(ops.fwd, q, k, v, learnable_sink=sink, **options)
    else:
        out = call.out
        lse = call_operator(ops.fwd_out, out, q, k, v, learnable_sink=sink, **options)
    return (out, lse) if return_lse else out
