# SPDX-License-Identifier: Apache-2.0
"""Every row of the truth table (docs/math.md, "Edge cases"), forward and backward."""

from __future__ import annotations

import pytest
import sinkattn
import torch

INF = float("inf")
NAN = float("nan")


@pytest.fixture(params=["fp64", "fp32", "bf16"])
def dtype(request, device):
    if device == "cuda" and request.param != "bf16":
        pytest.skip("a CPU dtype")
    return {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}[request.param]


@pytest.fixture(params=[64, 128])
def problem(request, device, dtype):
    g = torch.Generator().manual_seed(1)
    shapes = ((2, 40, 4, request.param), (2, 70, 2, request.param), (2, 70, 2, request.param))
    q, k, v = (torch.randn(s, generator=g).to(dtype).to(device) for s in shapes)
    dout = torch.randn(shapes[0], generator=g).to(dtype).to(device)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    dlse = torch.randn(2, 4, 40, generator=g).to(statistics).to(device)
    return q, k, v, dout, dlse


def run(problem, sink, **options):
    q, k, v, dout, dlse = problem
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    if sink is not None:
        statistics = torch.float64 if q.dtype == torch.float64 else torch.float32
        sink = torch.as_tensor(sink, dtype=statistics, device=q.device).expand(4)
        leaves.append(sink.clone().requires_grad_())
    out, lse = sinkattn.flash_attn_func(
        *leaves[:3],
        learnable_sink=leaves[3] if sink is not None else None,
        return_attn_probs=True,
        **options,
    )
    gradients = torch.autograd.grad([out, lse], leaves, [dout, dlse])
    return out.detach(), lse.detach(), *gradients


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (3, 2)}], ids=str)
def test_minus_infinity_is_no_sink(problem, options):
    plain = run(problem, None, **options)
    absent = run(problem, -INF, **options)
    for a, b in zip(plain, absent, strict=False):
        assert torch.equal(a, b)
    assert (absent[5] == 0).all()


def test_no_visible_key(problem):
    q, k, v, dout, dlse = problem
    short = (q, k[:, :10], v[:, :10], dout, dlse)  # causal: the first 30 rows see nothing
    out, lse, dq, *_ = run(short, None, causal=True)
    assert (out[:, :30] == 0).all()
    assert (lse[:, :, :30] == -INF).all()
    assert (dq[:, :30] == 0).all()
    sink = [0.1, -3.7, 88.0, -1e4]
    out, lse, dq, _, _, dsink = run(short, sink, causal=True)
    assert (out[:, :30] == 0).all()
    assert (dq[:, :30] == 0).all()
    expected = torch.tensor(sink, dtype=lse.dtype, device=lse.device)
    assert torch.equal(lse[:, :, :30], expected[None, :, None].expand(2, 4, 30))
    # Head 3's sink has no weight where a key is visible: its gradient is dLSE of the empty rows.
    torch.testing.assert_close(dsink[3], dlse[:, 3, :30].sum(), rtol=1e-5, atol=1e-5)


def test_no_keys_at_all(problem):
    q, k, v, dout, dlse = problem
    empty = (q, k[:, :0], v[:, :0], dout, dlse)
    out, lse, dq, dk, dv, dsink = run(empty, 0.5)
    assert (out == 0).all()
    assert (lse == 0.5).all()
    assert (dq == 0).all()
    assert dk.shape == (2, 0, 2, q.shape[-1])
    assert dv.shape == dk.shape
    torch.testing.assert_close(dsink, dlse.sum((0, 2)), rtol=1e-5, atol=1e-5)
    out, lse, *_ = run(empty, None)
    assert (lse == -INF).all()


def test_sink_far_above(problem):
    out, lse, dq, dk, dv, dsink = run(problem, 1e4)
    assert (out.abs() < 1e-30).all()
    torch.testing.assert_close(lse, torch.full_like(lse, 1e4))
    for x in (dq, dk, dv, dsink):
        assert x.isfinite().all()


def test_sink_far_below(problem):
    plain = run(problem, None)
    below = run(problem, -1e4)
    for a, b in zip(plain, below, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert (below[5] == 0).all()


@pytest.mark.parametrize("value", [88.0, -88.0, 3e38, -3e38, 0.0, 1e-40])
def test_extreme_sinks_are_finite(problem, value):
    results = run(problem, value)
    for x in results:
        assert x.isfinite().all()


def test_overflow_of_unshifted_exponential(problem):
    """Strongly negative scores with sink 0: exp(sink - max) alone would overflow."""
    q, k, v, dout, dlse = problem
    ones = (-q.abs(), k.abs(), v, dout, dlse)
    for scale in (1e3, 1e4):
        out, lse, *gradients = run(ones, 0.0, softmax_scale=scale)
        assert (lse == 0).all()
        assert (out == 0).all()
        assert all(x.isfinite().all() for x in gradients)


def test_plus_infinity(problem):
    out, lse, dq, dk, dv, dsink = run(problem, INF)
    assert (out == 0).all()
    assert (lse == INF).all()
    for x in (dq, dk, dv, dsink):
        assert (x == 0).all()


def test_nan_sink_stays_in_its_head(problem):
    sink = [0.3, NAN, 0.3, 0.3]
    q, k, v, dout, dlse = problem
    short = (q, k[:, :30], v[:, :30], dout, dlse)  # causal: the first 10 rows see nothing
    out, lse, dq, dk, dv, dsink = run(short, sink, causal=True)
    clean = run(short, 0.3, causal=True)
    others = [0, 2, 3]
    assert out[:, :, 1].isnan().all()
    assert lse[:, 1].isnan().all()
    assert torch.equal(out[:, :, others], clean[0][:, :, others])
    assert dq[:, 10:, 1].isnan().all()
    assert (dq[:, :10, 1] == 0).all()
    assert torch.equal(dq[:, :, others], clean[2][:, :, others])
    assert dk[:, :, 0].isnan().all()
    assert dv[:, :, 0].isnan().all()
    assert torch.equal(dk[:, :, 1], clean[3][:, :, 1])
    assert dsink.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("value", [NAN, INF])
def test_nan_or_infinite_score(problem, value):
    q, k, v, dout, dlse = problem
    q = q.clone()
    q[0, 5, 2, 0] = value
    k = k.clone()
    k[..., 0] = k[..., 0].abs() + 0.1  # +inf times a positive number
    out, lse, dq, dk, *_ = run((q, k, v, dout, dlse), 0.5)
    clean = run((problem[0], k, v, dout, dlse), 0.5)
    assert out[0, 5, 2].isnan().all()
    assert lse[0, 2, 5].isnan()
    assert torch.equal(out[1], clean[0][1])
    assert torch.equal(out[0, :5], clean[0][0, :5])
    assert dq[0, 5, 2].isnan().all()
    assert dk[0, :, 1].isnan().any()
    assert torch.equal(dk[:, :, 0], clean[3][:, :, 0])


def test_minus_infinite_score_has_no_weight(problem):
    q, k, v, dout, dlse = problem
    k = k.clone()
    k[:, 7, :, 0] = -INF
    q = q.clone()
    q[..., 0] = q[..., 0].abs() + 0.1
    out, lse, *_ = run((q, k, v, dout, dlse), 0.5)
    keep = [j for j in range(70) if j != 7]
    out_without, lse_without, *_ = run((q, k[:, keep], v[:, keep], dout, dlse), 0.5)
    torch.testing.assert_close(out, out_without, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(lse, lse_without, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 0, 0)])
def test_empty_batches(shape, device, dtype):
    b, sq, sk = shape
    q = torch.randn(b, sq, 4, 64, dtype=dtype, device=device, requires_grad=True)
    k = torch.randn(b, sk, 2, 64, dtype=dtype, device=device, requires_grad=True)
    sink = torch.zeros(4, device=device, requires_grad=True)
    out, lse = sinkattn.flash_attn_func(q, k, k, return_attn_probs=True, learnable_sink=sink)
    assert out.shape == (b, sq, 4, 64)
    assert lse.shape == (b, 4, sq)
    (out.sum() + lse.sum()).backward()
    assert (k.grad == 0).all()
    assert (sink.grad == 0).all()


def test_identities(problem):
    q, k, v, *_ = problem
    s = torch.tensor([0.5, -1.0, 2.0, 0.0], device=q.device)
    out, lse = sinkattn.flash_attn_func(q, k, v, return_attn_probs=True, learnable_sink=s)
    plain, lse_plain = sinkattn.flash_attn_func(q, k, v, return_attn_probs=True)
    weight = torch.sigmoid(lse_plain - s[None, :, None]).transpose(1, 2)[..., None]
    tolerance = {"rtol": 2e-2, "atol": 1e-3} if q.dtype == torch.bfloat16 else {}
    torch.testing.assert_close(out.to(weight.dtype), plain * weight, **tolerance)
    ones = sinkattn.flash_attn_func(q, k, torch.ones_like(v), learnable_sink=s)
    total = (1 - torch.exp(s[None, :, None] - lse)).transpose(1, 2)
    torch.testing.assert_close(ones[..., 0].to(total.dtype), total, **tolerance)
