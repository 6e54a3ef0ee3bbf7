# SPDX-License-Identifier: Apache-2.0
"""Merging partial results: splits of the keys, or ranks of a context-parallel group."""

from __future__ import annotations

import torch

from ._arguments import one_sink, tensor, wants_gradient
from ._ops import call as call_operator
from ._ops import ops


def flash_attn_combine(
    out_partial,
    lse_partial,
    out=None,
    out_dtype=None,
    *,
    s_aux=None,
    sinks=None,
    learnable_sink=None,
):
    """Merges n partial results; the sink, which partials exclude, is added once. Forward only.

    Args:
        out_partial: (n, b, s, h, dv) or (n, total, h, dv), fp32, last stride 1; 1 <= n <= 256.
        lse_partial: (n, b, s, h) or (n, total, h), fp32. A partial with LSE -inf contributes
            nothing, whatever its out holds.
        out: where to write the result; out_dtype: its dtype if it is allocated (default fp32).
        learnable_sink: (h,).

    Returns:
        (out (b, s, h, dv) or (total, h, dv), softmax_lse (b, s, h) or (total, h)); the LSE is a
        transposed view.
    """
    sink = one_sink(s_aux, sinks, learnable_sink)
    if wants_gradient(tensor(out_partial, "out_partial"), tensor(lse_partial, "lse_partial"), sink):
        raise NotImplementedError(
            "out_partial: expected no input that requires grad (merge_attention is "
            "differentiable), got one"
        )
    if out is None:
        return call_operator(ops.combine, out_partial, lse_partial, out_dtype, sink)
    if out_dtype is not None and out_dtype != tensor(out, "out").dtype:
        raise ValueError(f"out_dtype: expected the dtype of out, {out.dtype}, got {out_dtype}")
    return out, call_operator(ops.combine_out, out, out_partial, lse_partial, sink)


def merge_attention(outs, lses, *, out_dtype=None, s_aux=None, sinks=None, learnable_sink=None):
    """Merges attention results over disjoint keys, differentiable in outs, lses and the sink.

    Args:
        outs: n tensors (a list, or stacked) of (b, s, h, dv) or (total, h, dv).
        lses: n tensors of (b, h, s) or (h, total), as the attention functions return them.
        out_dtype: dtype of the merged output; default that of outs.
        learnable_sink: (h,); outs and lses must exclude it.

    Returns:
        (out, softmax_lse) in the same layouts, the LSE in fp32 (fp64 for fp64 outs).
    """
    sink = one_sink(s_aux, sinks, learnable_sink)
    outs = [tensor(x, "outs") for x in outs]
    lses = [tensor(x, "lses") for x in lses]
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"lses: expected one per tensor of outs and at least one, got {len(lses)} for "
            f"{len(outs)}"
        )
    compute = torch.float64 if outs[0].dtype == torch.float64 else torch.float32
    for out, lse in zip(outs, lses, strict=True):
        rows = (*out.shape[:-3], out.shape[-2], out.shape[-3])
        if out.shape != outs[0].shape or lse.shape != rows:
            raise ValueError(
                f"lses: expected shape {rows} for outs of shape {tuple(out.shape)} (all alike), "
                f"got {tuple(lse.shape)}"
            )
    if sink is not None and sink.shape != (outs[0].shape[-2],):
        raise ValueError(
            f"learnable_sink: expected shape ({outs[0].shape[-2]},), got {tuple(sink.shape)}"
        )
    logits = [lse.to(compute) for lse in lses]
    if sink is not None:
        logits.append(sink.to(compute).unsqueeze(-1).expand_as(logits[0]))
    stacked = torch.stack(logits)
    empty = (stacked == float("-inf")).all(dim=0)
    # logsumexp of nothing but -inf has NaN gradients: keep such rows out of it.
    lse = torch.logsumexp(torch.where(empty, 0.0, stacked), dim=0)
    lse = torch.where(empty, float("-inf"), lse)
    merged = torch.zeros_like(outs[0], dtype=compute)
    for out, logit in zip(outs, logits, strict=False):
        absent = (logit == float("-inf")) | empty
        weight = torch.exp(torch.where(absent, 0.0, logit) - torch.where(absent, 0.0, lse))
        hidden = absent.transpose(-1, -2).unsqueeze(-1)
        part = torch.where(hidden, 0.0, out.to(compute))
        weight = torch.where(absent, 0.0, weight)
        merged = merged + part * weight.transpose(-1, -2).unsqueeze(-1)
    return merged.to(outs[0].dtype if out_dtype is None else out_dtype), lse
