# SPDX-License-Identifier: Apache-2.0
"""Gradients as such: gradcheck in float64, repeatability, padding, and a model that trains."""

from __future__ import annotations

import pytest
import sinkattn
import torch
from support import Case, make_inputs, run

MASKS = [
    {},
    {"causal": True},
    {"window_size": (1, 1)},
    {"attention_chunk": 2},
    {"softcap": 1.5},
    {"causal": True, "window_size": (2, 0), "softcap": 3.0},
]


@pytest.mark.parametrize("options", MASKS, ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_sink", [False, True])
def test_gradcheck(options, packed, with_sink):
    """torch.autograd.gradcheck of out and LSE with respect to q, k, v and the sink."""
    shapes = (
        [(6, 4, 8), (7, 2, 8), (7, 2, 16)]
        if packed
        else [(2, 3, 4, 8), (2, 5, 2, 8), (2, 5, 2, 16)]
    )
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    if with_sink:
        leaves.append(torch.randn(4, dtype=torch.float64, requires_grad=True))

    def function(q, k, v, sink=None):
        if packed:
            cu_q = torch.tensor([0, 2, 6], dtype=torch.int32)
            cu_k = torch.tensor([0, 3, 7], dtype=torch.int32)
            out, lse = sinkattn.flash_attn_varlen_func(
                q, k, v, cu_q, cu_k, 4, 4, return_attn_probs=True, learnable_sink=sink, **options
            )
        else:
            out, lse = sinkattn.flash_attn_func(
                q, k, v, return_attn_probs=True, learnable_sink=sink, **options
            )
        # A row without keys and without a sink has LSE -inf, which no difference quotient likes.
        return out, torch.where(lse.isinf(), torch.zeros_like(lse), lse)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("dims", [(64, 64), (256, 256)])
def test_bitwise_repeatable(dtype, dims, device):
    if device == "cuda" and dtype == "fp32":
        pytest.skip("fp32 is a CPU dtype")
    inputs = make_inputs(Case(2, 150, 170, (8, 2), dims, dtype, (("causal", True),)))

    def once():
        return run(
            lambda q, k, v, s: sinkattn.flash_attn_func(
                q, k, v, causal=True, deterministic=True, return_attn_probs=True, learnable_sink=s
            ),
            inputs,
            device=device,
        )

    first = once()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for name, value in once().items():
            assert torch.equal(value, first[name]), name
    torch.set_num_threads(1)


def test_batch_invariance(device):
    """A sequence gives the same bits alone and among others."""
    inputs = make_inputs(Case(9, 70, 90, (6, 2), (64, 64), "bf16", (("causal", True),)))

    def results(rows):
        leaves = [x[rows].to(device).requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        out, lse = sinkattn.flash_attn_func(
            *leaves, causal=True, deterministic=True, return_attn_probs=True,
            learnable_sink=inputs.sink.to(device),
        )  # fmt: skip
        seeds = (inputs.dout[rows].to(device), inputs.dlse[rows].to(device))
        return (out, lse, *torch.autograd.grad((out, lse), leaves, seeds))

    everything = results(slice(0, 9))
    for rows in (slice(3, 4), slice(3, 5), slice(0, 4)):
        for whole, part in zip(everything, results(rows), strict=True):
            assert torch.equal(whole[3], part[3 - rows.start])


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_padding_never_matters(garbage, device):
    """Whatever lies outside the used range of any input, results have the same bits."""
    inputs = make_inputs(Case(2, 60, 70, (4, 2), (64, 64), "bf16"))
    used_q, used_k = [60, 13], [33, 70]
    index = {
        "seqused_q": torch.tensor(used_q, dtype=torch.int32, device=device),
        "seqused_k": torch.tensor(used_k, dtype=torch.int32, device=device),
    }

    def results(fill):
        tensors = [x.clone() for x in (inputs.q, inputs.k, inputs.v, inputs.dout)]
        dlse = inputs.dlse.clone()
        for b in range(2):
            for x, used in zip(tensors, (used_q, used_k, used_k, used_q), strict=True):
                x[b, used[b] :] = fill
            dlse[b, :, used_q[b] :] = fill
        leaves = [x.to(device).requires_grad_() for x in (*tensors[:3], inputs.sink)]
        out, lse = sinkattn.flash_attn_varlen_func(
            *leaves[:3], None, None, None, None, causal=True, return_attn_probs=True,
            learnable_sink=leaves[3], **index,
        )  # fmt: skip
        seeds = (tensors[3].to(device), dlse.to(device))
        return (out, lse, *torch.autograd.grad((out, lse), leaves, seeds))

    for clean, spoiled in zip(results(0.0), results(garbage), strict=True):
        assert torch.equal(clean, spoiled)


def test_training_follows_eager(device):
    """Two attention layers with sinks, 200 steps: loss and sinks follow the eager run in fp32.

    On CUDA attention is computed in bf16: it may stray twice as far as eager attention in bf16.
    """
    g = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 48, 32, generator=g).to(device)
    target = torch.randn(2, 48, 32, generator=g).to(device)
    weights = [torch.randn(32, 96, generator=g).to(device) / 6 for _ in range(2)]

    def train(attention):
        layers = [w.clone().requires_grad_() for w in weights]
        sinks = [torch.zeros(4, device=device, requires_grad=True) for _ in range(2)]
        optimizer = torch.optim.Adam([*layers, *sinks], lr=5e-4)
        losses = []
        for _ in range(200):
            x = tokens
            for weight, sink in zip(layers, sinks, strict=True):
                q, k, v = (x @ weight).unflatten(-1, (3, 4, 8)).unbind(2)
                x = x + attention(q, k, v, sink).flatten(2)
            loss = (x - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            for sink in sinks:
                assert sink.grad is not None
                assert (sink.grad != 0).all()
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses), torch.stack([s.detach() for s in sinks])

    options = {"causal": True, "window_size": (15, 0)}
    dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def flash(q, k, v, s):
        q, k, v = (x.to(dtype) for x in (q, k, v))
        return sinkattn.flash_attn_func(q, k, v, learnable_sink=s, **options).float()

    def eager_in(compute_dtype):
        def attention(q, k, v, s):
            q, k, v = (x.to(compute_dtype) for x in (q, k, v))
            out, _ = sinkattn.attention_reference(
                q, k, v, learnable_sink=s, compute_dtype=compute_dtype, **options
            )
            return out.float()

        return attention

    ours, eager = train(flash), train(eager_in(torch.float32))
    assert ours[0][-1] < 0.9 * ours[0][0]
    if device == "cpu":
        torch.testing.assert_close(ours[0], eager[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours[1], eager[1], rtol=1e-2, atol=1e-3)
        return
    same = train(eager_in(torch.bfloat16))
    for mine, low, exact in zip(ours, same, eager, strict=True):
        assert (mine - exact).abs().max() <= 2 * (low - exact).abs().max() + 1e-4
