# SPDX-License-Identifier: Apache-2.0
"""The backward's prepare pass: D' and dsink, on both devices, through the operators."""

from __future__ import annotations

import pytest
import sinkattn
import torch

INF = float("inf")


def problem(device, dtype, b=2, s=200, h=6, dv=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    out, dout = (torch.randn(b, s, h, dv, generator=g).to(dtype) for _ in range(2))
    lse, dlse = (torch.randn(b, h, s, generator=g) for _ in range(2))
    sink = torch.randn(h, generator=g)
    return [x.to(device) for x in (out, dout, lse, dlse, sink)]


def prepare(out, dout, lse, dlse, sink, **options):
    """(softmax_d, dsink) of bwd_out with nothing else wanted."""
    nothing = out.new_empty(0)
    key = out.new_zeros((*out.shape[:-2], 1, out.shape[-1]))
    if "cu_seqlens_q" in options:
        options |= {"cu_seqlens_k": options["cu_seqlens_q"], "max_seqlen_k": out.shape[0]}
    return torch.ops.sinkattn.bwd_out(
        nothing, nothing, nothing, dout, dlse, out, key, key, out, lse,
        need_dq=False, need_dkv=False, learnable_sink=sink, **options,
    )  # fmt: skip


def expected(out, dout, lse, dlse, sink):
    out, dout, lse, dlse, sink = (x.cpu().double() for x in (out, dout, lse, dlse, sink))
    d = (out * dout).sum(-1).transpose(-1, -2) - dlse
    terms = torch.exp(sink[:, None] - lse) * d
    return d, -terms.sum(-1).reshape(-1, sink.shape[0]).sum(0)


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def dtype(request):
    return request.param


@pytest.mark.parametrize("dv", [8, 40, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("s", [1, 127, 128, 129, 1000])
def test_dense(device, dtype, dv, s):
    inputs = problem(device, dtype, s=s, dv=dv)
    d, dsink = prepare(*inputs)
    d_true, dsink_true = expected(*inputs)
    torch.testing.assert_close(d[..., :s].cpu().double(), d_true, rtol=1e-5, atol=1e-4)
    assert (d[..., s:] == 0).all()
    torch.testing.assert_close(dsink.cpu().double(), dsink_true, rtol=1e-4, atol=1e-3)


def test_packed_with_used_lengths(device, dtype):
    out, dout, lse, dlse, sink = problem(device, dtype, b=1, s=600)
    packed = [out[0], dout[0], lse[0], dlse[0], sink]
    lengths, used = [0, 130, 1, 300, 0, 100], [0, 100, 1, 300, 0, 5]
    cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    d, dsink = prepare(
        *packed,
        cu_seqlens_q=cu,
        max_seqlen_q=300,
        seqused_q=torch.tensor(used, dtype=torch.int32, device=device),
    )
    d_true, _ = expected(*packed)
    inside = torch.zeros(600, dtype=torch.bool)
    for start, n in zip(cu.tolist(), used, strict=False):
        inside[start : start + n] = True
    torch.testing.assert_close(
        d[:, :600].cpu().double()[:, inside], d_true[:, inside], rtol=1e-5, atol=1e-4
    )
    assert (d[:, :600].cpu()[:, ~inside] == 0).all()
    terms = torch.exp(sink.cpu().double()[:, None] - lse[0].cpu().double()) * d_true
    torch.testing.assert_close(dsink.cpu().double(), -terms[:, inside].sum(1), rtol=1e-4, atol=1e-3)


def test_unused_rows_never_matter(device, dtype):
    out, dout, lse, dlse, sink = problem(device, dtype)
    used = torch.tensor([77, 0], dtype=torch.int32, device=device)
    clean = prepare(out, dout, lse, dlse, sink, seqused_q=used)
    for garbage in (float("nan"), INF, 1e30):
        spoiled = [x.clone() for x in (out, dout, lse, dlse)]
        for x in spoiled[:2]:
            x[0, 77:], x[1] = garbage, garbage
        for x in spoiled[2:]:
            x[0, :, 77:], x[1] = garbage, garbage
        for a, b in zip(clean, prepare(*spoiled, sink, seqused_q=used), strict=True):
            assert torch.equal(a, b)


def test_sink_extremes(device, dtype):
    out, dout, lse, dlse, _ = problem(device, dtype)
    sink = torch.tensor([-INF, INF, float("nan"), 3e38, -1e4, 0.0], device=device)
    lse[:, 1] = INF
    lse[:, 3] = 3e38
    lse[0, 5, :100] = -INF  # rows that saw nothing at all
    d, dsink = prepare(out, dout, lse, dlse, sink)
    d = d[..., :200].cpu().double()
    assert dsink[0] == 0
    assert dsink[1] == 0
    assert dsink[2].isnan()
    torch.testing.assert_close(dsink[3].cpu().double(), -d[:, 3].sum(), rtol=1e-4, atol=1e-3)
    assert dsink[4] == 0
    weight = torch.exp(-lse[:, 5].cpu().double())
    weight[0, :100] = 0
    torch.testing.assert_close(
        dsink[5].cpu().double(), -(weight * d[:, 5]).sum(), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_sink_dtypes_and_strides(device, dtype, kind):
    out, dout, lse, dlse, sink = problem(device, dtype, h=7)
    wide = torch.zeros(14, device=device, dtype=kind)
    wide[::2] = sink.to(kind)
    _, dsink = prepare(out, dout, lse, dlse, wide[::2])
    _, truth = expected(out, dout, lse, dlse, wide[::2])
    assert dsink.dtype == kind
    rtol = max(1e-4, 2 * torch.finfo(kind).eps)
    torch.testing.assert_close(dsink.cpu().double(), truth, rtol=rtol, atol=1e-3)


def test_gradient_of_the_lse_alone(device, dtype):
    out, _, lse, dlse, sink = problem(device, dtype)
    d, dsink = prepare(out, None, lse, dlse, sink)
    assert torch.equal(d[..., :200], -dlse)
    truth = (torch.exp(sink[:, None] - lse) * dlse).double().sum((0, 2))
    torch.testing.assert_close(dsink.double(), truth, rtol=1e-4, atol=1e-3)


def test_bitwise_repeatable(device, dtype):
    inputs = problem(device, dtype, s=3000)
    first = prepare(*inputs)
    for _ in range(50):
        for a, b in zip(first, prepare(*inputs), strict=True):
            assert torch.equal(a, b)


def test_strided_views(device, dtype):
    out, dout, lse, dlse, sink = problem(device, dtype)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (out, dout)]
    for a, b in zip(
        prepare(out, dout, lse, dlse, sink), prepare(*turned, lse, dlse, sink), strict=True
    ):
        assert torch.equal(a, b)


@pytest.fixture
def cuda(device):
    if device != "cuda":
        pytest.skip("about CUDA streams and graphs")
    return device


def test_current_stream(cuda, dtype):
    inputs = problem(cuda, dtype, s=4000)
    expected_results = prepare(*inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        slow = torch.randn(4096, 4096, device=cuda)
        for _ in range(20):
            slow = slow @ slow * 1e-3
        moved = [x + slow.sum().nan_to_num() * 0 for x in inputs]  # ready only after the products
        moved = [m.to(x.dtype) for m, x in zip(moved, inputs, strict=True)]
        results = prepare(*moved)
    stream.synchronize()
    for a, b in zip(expected_results, results, strict=True):
        assert torch.equal(a, b)


def test_graph_capture_and_replay(cuda, dtype):
    inputs = problem(cuda, dtype)
    prepare(*inputs)  # loads the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = prepare(*inputs)
    for seed in range(5):
        for x, y in zip(inputs, problem(cuda, dtype, seed=seed), strict=True):
            x.copy_(y)
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(results, prepare(*inputs), strict=True):
            assert torch.equal(a, b)


def test_what_is_not_built_says_so(cuda, dtype):
    q = torch.randn(1, 8, 2, 64, device=cuda).to(torch.float8_e4m3fn)
    with pytest.raises(NotImplementedError, match=r"q: expected bfloat16 or float16 on CUDA"):
        sinkattn.flash_attn_func(q, q, q)


def test_large_batch_of_heads(cuda, dtype):
    inputs = problem(cuda, dtype, b=1, s=8192, h=64)
    d, dsink = prepare(*inputs)
    d_true, dsink_true = expected(*inputs)
    torch.testing.assert_close(d[..., :8192].cpu().double(), d_true, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(dsink.cpu().double(), dsink_true, rtol=1e-3, atol=1e-2)
