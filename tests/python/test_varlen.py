# SPDX-License-Identifier: Apache-2.0
"""Packed sequences, used lengths, truncation: against eager torch in float64."""

from __future__ import annotations

import itertools

import pytest
import sinkattn
import torch
from support import close

MASKS = [{}, {"causal": True}, {"window_size": (9, 4)}, {"attention_chunk": 16}, {"softcap": 10.0}]
SHAPES = {
    "plain": ([17, 64, 1, 90], [17, 64, 1, 90]),
    "zero q": ([0, 5, 0, 33], [7, 12, 3, 40]),
    "zero k": ([6, 5, 9, 33], [0, 12, 0, 40]),
    "both zero": ([0, 0, 8], [0, 4, 0]),
    "one": ([130], [131]),
    "longer q": ([40, 70], [10, 71]),
}


def ends(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def tensors(total_q, total_k, h, hk, d, dtype, device, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g).to(dtype).to(device)

    return (
        normal(total_q, h, d),
        normal(total_k, hk, d),
        normal(total_k, hk, d),
        torch.randn(h, generator=g).to(device),
        normal(total_q, h, d),
        torch.randn(h, total_q, generator=g).to(device),
    )


def gradients(function, leaves, dout, dlse):
    leaves = [x.detach().requires_grad_() for x in leaves]
    out, lse = function(*leaves)
    seed = torch.where(lse.detach().isinf(), 0.0, dlse.to(lse.dtype))
    found = torch.autograd.grad([out, lse], leaves, [dout.to(out.dtype), seed])
    names = ("out", "lse", "dq", "dk", "dv", "dsink")
    return dict(zip(names, (out.detach(), lse.detach(), *found), strict=True))


@pytest.mark.parametrize("options", MASKS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spare", [0, 9], ids=["tight", "spare rows"])
@pytest.mark.parametrize("used", [False, True], ids=["", "seqused"])
def test_varlen(shape, options, spare, used, device):
    lengths_q, lengths_k = SHAPES[shape]
    cu_q, cu_k = ends(lengths_q).to(device), ends(lengths_k).to(device)
    total_q, total_k = sum(lengths_q) + spare, sum(lengths_k) + spare
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, k, v, sink, dout, dlse = tensors(total_q, total_k, 4, 2, 64, dtype, device)
    extra = {}
    if used:
        extra["seqused_q"] = torch.tensor(lengths_q, dtype=torch.int32, device=device) // 2
        extra["seqused_k"] = torch.tensor(lengths_k, dtype=torch.int32, device=device) // 2 + 3
    ours = gradients(
        lambda q, k, v, s: sinkattn.flash_attn_varlen_func(
            q, k, v, cu_q, cu_k, max(lengths_q), max(lengths_k) + 5, return_attn_probs=True,
            learnable_sink=s, **extra, **options,
        ),
        (q, k, v, sink), dout, dlse,
    )  # fmt: skip
    truth = gradients(
        lambda q, k, v, s: sinkattn.attention_reference(
            q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, learnable_sink=s, **extra, **options
        ),
        (q.double(), k.double(), v.double(), sink.double()), dout, dlse,
    )  # fmt: skip
    close(ours, truth, rtol=1e-5 if dtype == torch.float32 else 3e-2)
    if spare:
        assert (ours["out"][-spare:] == 0).all()
        assert (ours["lse"][:, -spare:] == float("-inf")).all()
        for name in ("dq", "dk", "dv"):
            assert (ours[name][-spare:] == 0).all(), name


@pytest.mark.parametrize("side", ["q", "k"])
def test_one_side_packed(side, device):
    """cu_seqlens for one side only; the other is dense."""
    lengths = [5, 0, 31]
    cu = ends(lengths).to(device)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, k, v, sink, dout, dlse = tensors(36, 36, 4, 2, 32, dtype, device)
    g = torch.Generator().manual_seed(5)
    if side == "q":
        k = torch.randn(3, 20, 2, 32, generator=g).to(device, dtype)
        v = torch.randn(3, 20, 2, 32, generator=g).to(device, dtype)
        arguments = (cu, None, 31, None)
    else:
        q = torch.randn(3, 20, 4, 32, generator=g).to(device, dtype)
        dout, dlse = torch.randn_like(q), torch.randn(3, 4, 20, device=device)
        arguments = (None, cu, None, 31)
    ours = gradients(
        lambda q, k, v, s: sinkattn.flash_attn_varlen_func(
            q, k, v, *arguments, causal=True, return_attn_probs=True, learnable_sink=s
        ),
        (q, k, v, sink), dout, dlse,
    )  # fmt: skip
    truth = gradients(
        lambda q, k, v, s: sinkattn.attention_reference(
            q, k, v, cu_seqlens_q=arguments[0], cu_seqlens_k=arguments[1], causal=True,
            learnable_sink=s,
        ),
        (q.double(), k.double(), v.double(), sink.double()), dout, dlse,
    )  # fmt: skip
    close(ours, truth, rtol=1e-5 if device == "cpu" else 1e-2)


def test_dense_with_used_lengths(device):
    """seqused without cu_seqlens, forward and backward; unused rows are zero."""
    g = torch.Generator().manual_seed(3)
    q, k = torch.randn(3, 20, 4, 64, generator=g), torch.randn(3, 30, 2, 64, generator=g)
    v, sink = torch.randn(3, 30, 2, 64, generator=g), torch.randn(4, generator=g)
    used = {
        "seqused_q": torch.tensor([20, 7, 0], dtype=torch.int32),
        "seqused_k": torch.tensor([11, 30, 4], dtype=torch.int32),
    }
    dout, dlse = torch.randn_like(q), torch.randn(3, 4, 20, generator=g)
    ours = gradients(
        lambda q, k, v, s: sinkattn.flash_attn_varlen_func(
            q, k, v, None, None, None, None, causal=True, return_attn_probs=True,
            learnable_sink=s, **used,
        ),
        (q, k, v, sink), dout, dlse,
    )  # fmt: skip
    truth = gradients(
        lambda q, k, v, s: sinkattn.attention_reference(
            q, k, v, causal=True, learnable_sink=s, **used
        ),
        (q.double(), k.double(), v.double(), sink.double()), dout, dlse,
    )  # fmt: skip
    close(ours, truth, rtol=1e-5)
    assert (ours["out"][1, 7:] == 0).all()
    assert (ours["lse"][1, :, 7:] == float("-inf")).all()
    assert (ours["dk"][0, 11:] == 0).all()
    assert (ours["dv"][2] == 0).all()


def test_truncation(device):
    """A bound that is too small truncates: the rest counts as unused."""
    cu = ends([30, 50]).to(device)
    q, k, v, sink, *_ = tensors(80, 80, 2, 1, 64, torch.bfloat16, device)
    out, lse = sinkattn.flash_attn_varlen_func(
        q, k, v, cu, cu, 40, 50, causal=True, return_attn_probs=True, learnable_sink=sink
    )
    same, lse_same = sinkattn.flash_attn_varlen_func(
        q, k, v, cu, cu, 50, 50, seqused_q=torch.tensor([30, 40], dtype=torch.int32, device=device),
        causal=True, return_attn_probs=True, learnable_sink=sink,
    )  # fmt: skip
    assert torch.equal(out, same)
    assert torch.equal(lse, lse_same)
    assert (out[70:] == 0).all()


@pytest.mark.parametrize(
    "values", [[0, -1, 40], [0, 30, 10], [-(2**31), 2**31 - 1, 5], [7, 7, 7], [50, 0, 2**31 - 1]]
)
def test_untrusted_cu_seqlens(values, device):
    """Nonsense in the index tensors: some finite answer, no access outside."""
    cu = torch.tensor(values, dtype=torch.int32, device=device)
    q, k, v, sink, dout, _ = tensors(40, 40, 2, 1, 64, torch.bfloat16, device)
    q, k, v, sink = (x.requires_grad_() for x in (q, k, v, sink))
    out = sinkattn.flash_attn_varlen_func(q, k, v, cu, cu, 40, 40, learnable_sink=sink)
    out.backward(dout)
    assert out.isfinite().all()
    assert all(x.grad.isfinite().all() for x in (q, k, v, sink))


def test_many_sequences(device):
    lengths = [1 + i % 3 for i in range(300)]
    cu = ends(lengths).to(device)
    q, k, v, sink, *_ = tensors(sum(lengths), sum(lengths), 2, 2, 64, torch.bfloat16, device)
    out = sinkattn.flash_attn_varlen_func(q, k, v, cu, cu, 3, 3, causal=True, learnable_sink=sink)
    row = int(cu[250])
    alone = sinkattn.flash_attn_func(
        q[None, row : row + lengths[250]],
        k[None, row : row + lengths[250]],
        v[None, row : row + lengths[250]],
        causal=True,
        learnable_sink=sink,
    )
    assert torch.equal(out[row : row + lengths[250]], alone[0])


def test_packed_variants(device):
    """Packed tensors give the bits of the unpacked call, and one gradient."""
    g = torch.Generator().manual_seed(7)
    qkv = torch.randn(2, 33, 3, 4, 64, generator=g).bfloat16().to(device)
    sink = torch.randn(4, generator=g).to(device)
    dout = torch.randn(2, 33, 4, 64, generator=g).bfloat16().to(device)

    def gradient(function, leaf):
        leaf = leaf.detach().requires_grad_()
        s = sink.detach().requires_grad_()
        out = function(leaf, s)
        return (out, *torch.autograd.grad(out, (leaf, s), dout.view_as(out)))

    plain = gradient(
        lambda x, s: sinkattn.flash_attn_func(*x.unbind(2), causal=True, learnable_sink=s), qkv
    )
    packed = gradient(
        lambda x, s: sinkattn.flash_attn_qkvpacked_func(x, causal=True, learnable_sink=s), qkv
    )
    heads = gradient(
        lambda x, s: sinkattn.flash_attn_qkvpacked_func(
            x, causal=True, num_heads_q=4, learnable_sink=s
        ),
        qkv.flatten(2, 3),
    )
    cu = torch.tensor([0, 33, 66], dtype=torch.int32, device=device)
    varlen = gradient(
        lambda x, s: sinkattn.flash_attn_varlen_qkvpacked_func(
            x, cu, 33, causal=True, learnable_sink=s
        ),
        qkv.flatten(0, 1),
    )
    for other in (packed, heads, varlen):
        for a, b in zip(plain, other, strict=True):
            assert torch.equal(a.flatten(), b.flatten())
    q, kv = qkv[:, :, 0], qkv[:, :, 1:]
    one = sinkattn.flash_attn_kvpacked_func(q, kv, causal=True, learnable_sink=sink)
    two = sinkattn.flash_attn_varlen_kvpacked_func(
        q.flatten(0, 1), kv.flatten(0, 1), cu, cu, 33, 33, causal=True, learnable_sink=sink
    )
    assert torch.equal(one, plain[0])
    assert torch.equal(two.view_as(one), one)
