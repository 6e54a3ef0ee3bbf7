# SPDX-License-Identifier: Apache-2.0
"""Merging partial results, and its gradients."""

from __future__ import annotations

import pytest
import sinkattn
import torch


def partials(n, shape, dv, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, dv, generator=g), 3 * torch.randn(n, *shape, generator=g)


def truth(out_partial, lse_partial, sink):
    """Float64: concatenate, softmax over the partials."""
    lse = lse_partial.double()
    if sink is not None:
        lse = torch.cat([lse, sink.double().expand_as(lse[:1])])
    total = torch.logsumexp(lse, 0)
    weight = torch.exp(lse_partial.double() - total).unsqueeze(-1)
    out = torch.where(weight == 0, 0.0, weight * out_partial.double()).sum(0)
    return out, total


@pytest.mark.parametrize("n", [1, 2, 3, 17, 55, 133, 256])
@pytest.mark.parametrize("dv", [64, 59, 128, 512])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_sink", [False, True])
def test_combine(n, dv, packed, with_sink, device):
    shape = (33, 3) if packed else (2, 5, 3)
    out_partial, lse_partial = partials(n, shape, dv)
    sink = torch.tensor([0.3, -2.0, 4.0]) if with_sink else None
    expected, lse_expected = truth(out_partial, lse_partial, sink)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out, lse = sinkattn.flash_attn_combine(
            out_partial.to(device),
            lse_partial.to(device),
            out_dtype=dtype,
            learnable_sink=None if sink is None else sink.to(device),
        )
        assert out.dtype == dtype
        rtol = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(out.cpu().double(), expected, rtol=rtol, atol=1e-6)
        torch.testing.assert_close(lse.cpu().double(), lse_expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("empty", [(0,), (1,), (2,), (0, 1, 2)])
@pytest.mark.parametrize("sink", [None, 0.7, -float("inf")])
def test_empty_partials(empty, sink, device):
    """A partial with LSE -inf contributes nothing, even if its output is NaN."""
    out_partial, lse_partial = partials(3, (1, 4, 2), 64)
    for i in empty:
        lse_partial[i] = float("-inf")
        out_partial[i] = float("nan")
    s = None if sink is None else torch.full((2,), sink)
    out, lse = sinkattn.flash_attn_combine(
        out_partial.to(device), lse_partial.to(device),
        learnable_sink=None if s is None else s.to(device),
    )  # fmt: skip
    if len(empty) == 3:
        assert (out == 0).all()
        assert (lse == (float("-inf") if sink is None else sink)).all()
        return
    rest = [i for i in range(3) if i not in empty]
    expected, lse_expected = truth(out_partial[rest], lse_partial[rest], s)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.cpu().double(), lse_expected, rtol=1e-5, atol=1e-6)


def test_out_argument(device):
    out_partial, lse_partial = (x.to(device) for x in partials(3, (1, 4, 2), 64))
    expected, _ = sinkattn.flash_attn_combine(out_partial, lse_partial)
    target = torch.full_like(expected, float("nan"))
    out, _ = sinkattn.flash_attn_combine(out_partial, lse_partial, out=target)
    assert out is target
    assert torch.equal(target, expected)


@pytest.mark.parametrize("sink_on", [False, True])
def test_merge_equals_one_call(sink_on, device):
    """Attention over disjoint keys, merged, is attention over all of them; gradients too."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, n, h, 64, generator=g).double() for n, h in ((20, 4), (90, 2), (90, 2))
    )
    sink = torch.randn(4, generator=g).double()
    leaves = [x.requires_grad_() for x in (q, k, v, sink)]

    def whole(q, k, v, s):
        return sinkattn.flash_attn_func(
            q, k, v, return_attn_probs=True, learnable_sink=s if sink_on else None
        )

    def merged(q, k, v, s):
        parts = [
            sinkattn.flash_attn_func(q, k[:, a:b], v[:, a:b], return_attn_probs=True)
            for a, b in ((0, 0), (0, 40), (40, 41), (41, 90))
        ]
        return sinkattn.merge_attention(
            [x[0] for x in parts], [x[1] for x in parts], learnable_sink=s if sink_on else None
        )

    dout, dlse = torch.randn(2, 20, 4, 64).double(), torch.randn(2, 4, 20).double()
    wanted = leaves if sink_on else leaves[:3]
    a, b = whole(*leaves), merged(*leaves)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
    ga, gb = (torch.autograd.grad(x, wanted, (dout, dlse)) for x in (a, b))
    for x, y in zip(ga, gb, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)


def test_merge_of_nothing():
    out = torch.full((1, 3, 2, 8), float("nan"), requires_grad=True)
    lse = torch.full((1, 2, 3), float("-inf"), requires_grad=True)
    merged, total = sinkattn.merge_attention([out, out], [lse, lse])
    assert (merged == 0).all()
    assert (total == float("-inf")).all()
    merged.sum().backward()
    assert (out.grad == 0).all()
