# SPDX-License-Identifier: Apache-2.0
"""Repeated calls give the same bits, whatever else the machine does meanwhile: 20 repetitions in
the quick tier, 1000 in the full one."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import sinkattn
import torch

DIMS = [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)]
MASKS = {"causal": {"causal": True}, "window": {"window_size": (50, 10)}}
NAMES = ("out", "lse", "dq", "dk", "dv", "dsink")


@contextmanager
def busy_machine(device):
    """Yields a function to call now and then. CPU: changes the number of threads. CUDA: a second
    stream fills the machine, so that blocks start in varying order, and half of the free memory is
    taken."""
    if device == "cpu":
        counts = iter(range(10**9))
        yield lambda: torch.set_num_threads(1 + next(counts) % 3)
        torch.set_num_threads(1)
        return
    ballast = torch.empty(torch.cuda.mem_get_info()[0] // 2, dtype=torch.uint8, device=device)
    stream = torch.cuda.Stream()
    a = torch.randn(2048, 2048, dtype=torch.bfloat16, device=device)
    c = torch.empty_like(a)
    counts = iter(range(10**9))

    def disturb():
        if next(counts) % 4 == 0:
            with torch.cuda.stream(stream):
                torch.mm(a, a, out=c)

    yield disturb
    stream.synchronize()
    del ballast


def tensors(device, dims, layout):
    """q, k, v, sink, dout, dlse and the arguments of the layout."""
    g = torch.Generator().manual_seed(sum(dims))
    b, sq, sk, h, hk = (1, 70, 90, 6, 2) if device == "cpu" else (3, 1000, 1100, 12, 4)
    d, dv = dims
    lead_q, lead_k, lead_lse = (b, sq), (b, sk), (b, h, sq)
    arguments = ()
    if layout == "packed":
        lead_q, lead_k, lead_lse = (b * sq,), (b * sk,), (h, b * sq)
        cu_q = torch.tensor([0, sq // 3, sq // 3, b * sq], dtype=torch.int32, device=device)
        cu_k = torch.tensor([0, sk // 2, sk // 2, b * sk], dtype=torch.int32, device=device)
        arguments = (cu_q, cu_k, b * sq, b * sk)
    shapes = [(*lead_q, h, d), (*lead_k, hk, d), (*lead_k, hk, dv), (h,), (*lead_q, h, dv)]
    made = [torch.randn(s, generator=g).to(device) for s in shapes]
    q, k, v, dout = (made[i].to(torch.bfloat16) for i in (0, 1, 2, 4))
    return (q, k, v, made[3]), (dout, torch.randn(lead_lse, generator=g).to(device)), arguments


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("layout", ["dense", "packed"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("deterministic", [True, False])
def test_same_bits(dims, layout, mask, deterministic, device, repetitions):
    """deterministic=True: everything. False: dq, dk and dv may vary in their last bits on CUDA."""
    inputs, seeds, arguments = tensors(device, dims, layout)
    function = sinkattn.flash_attn_varlen_func if arguments else sinkattn.flash_attn_func
    leaves = [x.requires_grad_() for x in inputs]

    def once():
        out, lse = function(
            *leaves[:3], *arguments, **MASKS[mask], deterministic=deterministic,
            return_attn_probs=True, learnable_sink=leaves[3],
        )  # fmt: skip
        return (out, lse, *torch.autograd.grad((out, lse), leaves, seeds))

    exact = NAMES if deterministic or device == "cpu" else ("out", "lse", "dsink")
    first = dict(zip(NAMES, once(), strict=True))
    assert all(x.isfinite().all() for x in first.values())
    with busy_machine(device) as disturb:
        for i in range(repetitions):
            disturb()
            for name, value in zip(NAMES, once(), strict=True):
                if name in exact:
                    assert torch.equal(value, first[name]), f"{name}, repetition {i}"
                else:
                    torch.testing.assert_close(value, first[name], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("splits", [3, 17])
def test_splits_same_bits(splits, device, repetitions):
    """A decode step over a split cache."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 1, 8, 64, generator=g).to(device, torch.bfloat16)
    k, v = (torch.randn(2, 1500, 2, 64, generator=g).to(device, torch.bfloat16) for _ in range(2))
    sink = torch.randn(8, generator=g).to(device)
    used = torch.tensor([1500, 333], dtype=torch.int32, device=device)

    def once():
        return sinkattn.flash_attn_with_kvcache(
            q, k, v, cache_seqlens=used, causal=True, num_splits=splits, return_softmax_lse=True,
            learnable_sink=sink,
        )  # fmt: skip

    first = once()
    with busy_machine(device) as disturb:
        for i in range(repetitions):
            disturb()
            for a, b in zip(first, once(), strict=True):
                assert torch.equal(a, b), f"repetition {i}"


def test_dsink_same_bits(device, repetitions):
    """The prepare pass alone: sums over many blocks, in a fixed order."""
    g = torch.Generator().manual_seed(0)
    s = 300 if device == "cpu" else 20000
    out, dout = (torch.randn(2, s, 6, 64, generator=g).to(device, torch.bfloat16) for _ in "ab")
    lse, dlse = (torch.randn(2, 6, s, generator=g).to(device) for _ in "ab")
    sink = torch.randn(6, generator=g).to(device)
    nothing, key = out.new_empty(0), out.new_zeros(2, s, 1, 64)

    def once():
        return torch.ops.sinkattn.bwd_out(
            nothing, nothing, nothing, dout, dlse, out, key, key, out, lse,
            need_dq=False, need_dkv=False, learnable_sink=sink,
        )  # fmt: skip

    first = once()
    with busy_machine(device) as disturb:
        for i in range(repetitions):
            disturb()
            for a, b in zip(first, once(), strict=True):
                assert torch.equal(a, b), f"repetition {i}"
