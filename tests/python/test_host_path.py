# SPDX-License-Identifier: Apache-2.0
"""The short way of a plain call: taken when it may be, and not to be told from the general one."""

from __future__ import annotations

import pytest
import sinkattn
import torch
from sinkattn import _direct, _execute, autograd, interface
from support import PLAIN_OPTIONS
from torch._subclasses import FakeTensorMode


def plain_inputs(gradient=False, dtype=torch.float32):
    g = torch.Generator().manual_seed(7)
    shapes = (2, 5, 4, 16), (2, 7, 2, 16), (2, 7, 2, 24)
    tensors = [torch.randn(*shape, generator=g).to(dtype) for shape in shapes]
    return [x.requires_grad_(gradient) for x in (*tensors, torch.randn(4, generator=g))]


@pytest.fixture
def short_calls(monkeypatch):
    """Counts the calls that reach the operator of plain calls; the direct entry takes none."""
    calls = []
    monkeypatch.setattr(_direct, "call", lambda *arguments: None)

    def count(name):
        real = getattr(autograd, name)

        def counted(*arguments):
            calls.append(name)
            return real(*arguments)

        for module in (autograd, _execute):
            monkeypatch.setattr(module, name, counted)

    count("forward_dense")
    count("forward_dense_no_lse")
    return calls


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("options", PLAIN_OPTIONS)
def test_plain_calls_are_short(short_calls, monkeypatch, gradient, options):
    def results():
        q, k, v, sink = leaves = plain_inputs(gradient)
        found = sinkattn.flash_attn_func(q, k, v, learnable_sink=sink, **options)
        found = found if isinstance(found, tuple) else (found,)
        if gradient:
            found += torch.autograd.grad(found, leaves, [torch.ones_like(x) for x in found])
        return found

    short = results()
    assert len(short_calls) == 1
    monkeypatch.setattr(interface, "attend_dense", lambda *arguments: None)
    general = results()
    assert len(short_calls) == 1
    for a, b in zip(short, general, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 2.0},
        {"num_splits": 2},
        {"attention_chunk": 4},
        {"softmax_scale": 1},
        {"window_size": [2, 2]},
        {"pack_gqa": True},
    ],
    ids=str,
)
def test_other_options_take_the_general_way(short_calls, options):
    q, k, v, sink = plain_inputs()
    sinkattn.flash_attn_func(q, k, v, learnable_sink=sink, **options)
    assert short_calls == []


@pytest.mark.parametrize(
    "change",
    [
        {"k": torch.zeros(2, 7, 3, 16)},
        {"q": torch.zeros(2, 4, 16)},
        {"v": torch.zeros(2, 7, 2, 24, dtype=torch.float64)},
        {"learnable_sink": torch.zeros(3)},
        {"softmax_scale": -1.0},
        {"window_size": (1 << 70, 0)},
        {"softcap": -1.0},
        {"sm_margin": True},
        {"attention_chunk": 0.0},
        {"causal": 0},
        {"deterministic": None},
    ],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.parametrize("gradient", [False, True])
def test_errors_are_those_of_the_general_way(monkeypatch, change, gradient):
    q, k, v, sink = plain_inputs(gradient)
    arguments = {"q": q, "k": k, "v": v, "learnable_sink": sink} | change

    def error():
        with pytest.raises(Exception, match="xpected") as caught:
            sinkattn.flash_attn_func(**arguments)
        return caught.type, str(caught.value).splitlines()[0]

    direct = error()
    monkeypatch.setattr(_direct, "call", lambda *arguments: None)
    assert direct == error()
    monkeypatch.setattr(interface, "attend_dense", lambda *arguments: None)
    assert direct == error()


@pytest.mark.parametrize("length", [1, 300])
def test_the_lse_changes_nothing(device, needs, length):
    """Plain calls that nobody asks for the LSE run without one: on a GPU, kernels that skip it."""
    needs("forward")
    g = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(2, n, h, 64, generator=g).bfloat16().to(device)
        for n, h in ((length, 8), (400, 2), (400, 2))
    )
    sink = torch.randn(8, generator=g).to(device)
    alone = sinkattn.flash_attn_func(q, k, v, causal=True, learnable_sink=sink)
    out, _ = sinkattn.flash_attn_func(
        q, k, v, causal=True, learnable_sink=sink, return_attn_probs=True
    )
    assert torch.equal(alone, out)


def test_layouts_that_need_a_copy_get_one():
    q, k, v, sink = plain_inputs()
    expected = sinkattn.flash_attn_func(q, k, v, learnable_sink=sink)
    turned = q.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(sinkattn.flash_attn_func(turned, k, v, learnable_sink=sink), expected)


def test_traced_tensors_are_not_asked_for_an_address():
    """The backward of compiled code is traced outside of Dynamo, with tensors that have none."""
    with FakeTensorMode():
        x = torch.empty(2, 3, 4, 64, dtype=torch.bfloat16, device="cuda")
        assert autograd.ready(x) is x


def test_transforms_of_torch_func_see_no_short_way():
    q, k, v, _ = plain_inputs(gradient=True)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda q: sinkattn.flash_attn_func(q, k, v).sum())(q)


def test_the_benchmark_times_every_layer():
    from sinkattn.bench.host import LIMITS_US, layers, median_us

    device = torch.device("cpu")
    calls = layers(device, 0)
    assert set(LIMITS_US) <= set(calls)
    assert all(median_us(call, device, calls=5) > 0 for call in calls.values())
