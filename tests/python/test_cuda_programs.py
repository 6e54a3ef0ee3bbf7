# SPDX-License-Identifier: Apache-2.0
"""Compiled functions and CUDA graphs of forward and backward, on the device of the tensors."""

from __future__ import annotations

import pytest
import sinkattn
import torch

MASKS = [{}, {"causal": True}, {"causal": True, "window_size": (20, 0)}]


def leaves(device, dims=(64, 64), seed=0):
    g = torch.Generator().manual_seed(seed)
    d, dv = dims
    shapes = (2, 200, 8, d), (2, 200, 2, d), (2, 200, 2, dv)
    tensors = [torch.randn(s, generator=g).to(device, torch.bfloat16) for s in shapes]
    tensors.append(torch.randn(8, generator=g).to(device))
    return [x.requires_grad_() for x in tensors]


def step(q, k, v, sink, **options):
    """out, LSE and all gradients of a loss on both."""
    out, lse = sinkattn.flash_attn_func(
        q, k, v, learnable_sink=sink, deterministic=True, return_attn_probs=True, **options
    )
    loss = out.float().square().sum() + lse.sum()
    return (out.detach(), lse.detach(), *torch.autograd.grad(loss, (q, k, v, sink)))


@pytest.mark.parametrize("options", MASKS, ids=str)
def test_compiled_equals_eager(options, device):
    def forward(q, k, v, sink):
        return sinkattn.flash_attn_func(
            q, k, v, learnable_sink=sink, deterministic=True, return_attn_probs=True, **options
        )

    def gradients(function):
        inputs = leaves(device)
        out, lse = function(*inputs)
        seeds = [torch.ones_like(out), torch.ones_like(lse)]
        return (out.detach(), lse.detach(), *torch.autograd.grad((out, lse), inputs, seeds))

    torch._dynamo.reset()
    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
    for a, b in zip(gradients(compiled), gradients(forward), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", MASKS, ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128)], ids=str)
def test_graph_of_a_training_step(options, dims, device):
    """Replays with contents changed in place give what a plain call gives, bit for bit."""
    if device == "cpu":
        pytest.skip("CUDA graphs")
    inputs = leaves(device, dims)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(*inputs, **options)  # loads the kernels
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step(*inputs, **options)
    for seed in range(1, 4):
        fresh = leaves(device, dims, seed)
        with torch.no_grad():
            for x, y in zip(inputs, fresh, strict=True):
                x.copy_(y)
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(captured, step(*fresh, **options), strict=True):
            assert torch.equal(a, b)
