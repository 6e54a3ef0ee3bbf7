# SPDX-License-Identifier: Apache-2.0
"""Result check of a benchmark case: fp32 attention of KV head 0 in query blocks, on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .cases import Case
from .providers import Inputs

BLOCK = 1024  # query rows at a time: bounds the memory of the reference


@dataclass
class Reference:
    """fp32 results for the query heads of KV head 0; packed layouts keep (total, h, d)."""

    out: torch.Tensor
    dq: torch.Tensor | None = None
    dk: torch.Tensor | None = None
    dv: torch.Tensor | None = None
    dsink: torch.Tensor | None = None


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """L2 norm of the difference over the L2 norm of the reference; NaN stays NaN."""
    difference = (result.float() - reference.float()).norm()
    return float(difference / reference.float().norm().clamp_min(1e-30))


def reference(case: Case, inputs: Inputs, with_sink: bool, backward: bool) -> Reference:
    """Exact attention of KV head 0 and, if asked, its gradients for `inputs.dout`."""
    group = case.heads_q // case.heads_kv
    sink = inputs.sink[:group].float() if with_sink else None
    q = inputs.query[..., :group, :].float()
    dout = inputs.dout[..., :group, :].float()
    k = inputs.key[..., 0, :].float()
    v = inputs.value[..., 0, :].float()
    result = Reference(torch.empty_like(dout))
    if backward:
        result.dq, result.dk, result.dv = (torch.zeros_like(x) for x in (q, k, v))
        result.dsink = torch.zeros(group, device=q.device)
    for queries, keys in _sequences(case):
        part = _one_sequence(
            case, q[queries], k[keys], v[keys], sink, dout[queries] if backward else None
        )
        result.out[queries] = part.out
        if backward:
            result.dq[queries], result.dk[keys], result.dv[keys] = part.dq, part.dk, part.dv
            if with_sink:
                result.dsink += part.dsink
    return result


def _sequences(case: Case):
    if case.packed:
        start = 0
        for length in case.lengths:
            rows = slice(start, start + length)
            yield rows, rows
            start += length
    else:
        for b in range(case.batch):
            yield b, (b, slice(0, case.lengths[b])) if case.lengths else b


def _one_sequence(case: Case, q, k, v, sink, dout) -> Reference:
    """q (sq, g, d), k (sk, d), v (sk, dv)."""
    sq, sk = q.shape[0], k.shape[0]
    scale = case.headdim**-0.5
    columns = torch.arange(sk, device=q.device)
    result = Reference(torch.empty(*q.shape[:2], v.shape[-1], device=q.device))
    if dout is not None:
        result.dq, result.dk, result.dv = (torch.zeros_like(x) for x in (q, k, v))
        result.dsink = torch.zeros(q.shape[1], device=q.device)
    for start in range(0, sq, BLOCK):
        rows = slice(start, min(start + BLOCK, sq))
        position = torch.arange(rows.start, rows.stop, device=q.device)[:, None] + sk - sq
        hidden = torch.zeros(rows.stop - rows.start, sk, dtype=torch.bool, device=q.device)
        if case.causal:
            hidden |= columns > position
        if case.window_left >= 0:
            hidden |= columns < position - case.window_left
        scores = torch.einsum("igd,jd->gij", q[rows], k) * scale
        scores.masked_fill_(hidden, float("-inf"))
        lse = torch.logsumexp(scores, dim=-1)
        if sink is not None:
            lse = torch.logaddexp(lse, sink[:, None])
        weights = torch.exp(scores - lse[..., None])
        result.out[rows] = torch.einsum("gij,jd->igd", weights, v)
        if dout is None:
            continue
        grad = dout[rows]
        delta = (grad * result.out[rows]).sum(-1).T  # (g, i)
        dscores = weights * (torch.einsum("igd,jd->gij", grad, v) - delta[..., None])
        result.dq[rows] = torch.einsum("gij,jd->igd", dscores, k) * scale
        result.dk += torch.einsum("gij,igd->jd", dscores, q[rows]) * scale
        result.dv += torch.einsum("gij,igd->jd", weights, grad)
        if sink is not None:
            result.dsink -= (torch.exp(sink[:, None] - lse) * delta).sum(-1)
    return result
