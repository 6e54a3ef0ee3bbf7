# SPDX-License-Identifier: Apache-2.0
"""torch.compile(fullgraph=True) and torch.export: the eager results, bit for bit.

The graphs run on the aot_eager backend: what is tested is that the calls trace without a break,
forward and backward, and that symbolic lengths do not recompile. One test goes through Inductor.
"""

from __future__ import annotations

import itertools

import pytest
import sinkattn
import torch
from torch._dynamo.testing import CompileCounterWithBackend

CU = torch.tensor([0, 5, 9], dtype=torch.int32)
LENGTHS = (3, 5, 9, 17, 20, 33, 64, 65, 100, 128)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def leaf(*shape, requires_grad=True):
    return torch.randn(*shape).requires_grad_(requires_grad)


def with_gradients(function, inputs):
    """Results and the gradients of every input that requires one, with a loss on all results."""
    results = function(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    leaves = [x for x in inputs if x.requires_grad]
    if not leaves:
        return list(results)
    torch.manual_seed(1)
    seeds = [torch.randn_like(x) for x in results]
    return [*results, *torch.autograd.grad(results, leaves, seeds)]


def dense(**options):
    def function(q, k, v, sink):
        return sinkattn.flash_attn_func(q, k, v, learnable_sink=sink, **options)

    return function, (leaf(2, 9, 4, 64), leaf(2, 12, 2, 64), leaf(2, 12, 2, 64), leaf(4))


def sink_alone():
    function, inputs = dense(causal=True)
    return function, (*(x.detach() for x in inputs[:3]), inputs[3])


def no_gradient():
    function, inputs = dense(causal=True, num_splits=0)
    return function, tuple(x.detach() for x in inputs)


def one_tensor_three_times():
    def function(x, sink):
        return sinkattn.flash_attn_func(x, x, x, causal=True, learnable_sink=sink)

    return function, (leaf(2, 9, 4, 64), leaf(4))


def varlen(seqused=False):
    used = torch.tensor([4, 3], dtype=torch.int32)

    def function(q, k, v, sink):
        options = {"seqused_q": used, "seqused_k": used} if seqused else {}
        return sinkattn.flash_attn_varlen_func(
            q, k, v, CU, CU, 5, 5, causal=True, return_attn_probs=True, s_aux=sink, **options
        )

    return function, (leaf(9, 4, 64), leaf(9, 2, 64), leaf(9, 2, 64), leaf(4))


def packed(heads):
    def function(qkv, sink):
        return sinkattn.flash_attn_qkvpacked_func(
            qkv, causal=True, num_heads_q=heads, learnable_sink=sink
        )

    return function, (leaf(2, 9, 3, 4, 64) if heads is None else leaf(2, 9, 8, 64), leaf(4))


def kv_packed():
    def function(q, kv, sink):
        return sinkattn.flash_attn_kvpacked_func(q, kv, return_attn_probs=True, learnable_sink=sink)

    return function, (leaf(2, 9, 4, 64), leaf(2, 12, 2, 2, 64), leaf(4))


def varlen_packed():
    def function(qkv, sink):
        return sinkattn.flash_attn_varlen_qkvpacked_func(
            qkv, CU, 5, causal=True, learnable_sink=sink
        )

    return function, (leaf(9, 3, 4, 64), leaf(4))


def combine():
    def function(out, lse, sink):
        return sinkattn.flash_attn_combine(out, lse, learnable_sink=sink)

    return function, (torch.randn(3, 2, 5, 4, 64), torch.randn(3, 2, 5, 4), torch.randn(4))


def merge():
    def function(outs, lses, sink):
        return sinkattn.merge_attention(
            list(outs.unbind()), list(lses.unbind()), learnable_sink=sink
        )

    return function, (leaf(3, 2, 5, 4, 64), leaf(3, 2, 4, 5), leaf(4))


CASES = {
    "dense": lambda: dense(causal=True),
    "lse gradient": lambda: dense(causal=True, return_attn_probs=True),
    "heuristic splits": lambda: dense(num_splits=0),
    "deterministic window": lambda: dense(causal=True, window_size=(3, 0), deterministic=True),
    "sink alone": sink_alone,
    "no gradient": no_gradient,
    "one tensor three times": one_tensor_three_times,
    "varlen, one cu_seqlens": varlen,
    "varlen, one seqused": lambda: varlen(seqused=True),
    "qkv packed": lambda: packed(None),
    "qkv packed by heads": lambda: packed(4),
    "kv packed": kv_packed,
    "varlen packed": varlen_packed,
    "combine": combine,
    "merge": merge,
}


@pytest.mark.parametrize("name", CASES)
def test_compiled_equals_eager(name):
    function, inputs = CASES[name]()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected, found = with_gradients(function, inputs), with_gradients(compiled, inputs)
    assert len(expected) == len(found)
    for a, b in zip(expected, found, strict=True):
        if name == "one tensor three times":
            # The sum dq + dk + dv is autograd's, in an order of its own.
            torch.testing.assert_close(a, b)
        else:
            assert torch.equal(a, b)


def kv_step(q, k_cache, v_cache, k, v, lengths, sink):
    metadata = sinkattn.get_scheduler_metadata(2, 1, 30, 4, 2, 64, lengths, num_splits=0)
    return sinkattn.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True, num_splits=0,
        scheduler_metadata=metadata, return_softmax_lse=True, sinks=sink,
    )  # fmt: skip


def test_compiled_cache_step():
    cache = torch.randn(2, 30, 2, 64)
    q, new, sink = torch.randn(2, 1, 4, 64), torch.randn(2, 1, 2, 64), torch.randn(4)
    lengths = torch.tensor([3, 20], dtype=torch.int32)
    results = {}
    for name, step in (
        ("eager", kv_step),
        ("compiled", torch.compile(kv_step, fullgraph=True, backend="aot_eager")),
    ):
        k_cache, v_cache = cache.clone(), cache.clone()
        results[name] = [*step(q, k_cache, v_cache, new, new, lengths, sink), k_cache, v_cache]
    for a, b in zip(*results.values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(results["compiled"][2][0, 3], new[0, 0])  # the append happened


def test_compiled_output_argument():
    q, k = torch.randn(9, 4, 64), torch.randn(9, 2, 64)

    def function(q, k, out):
        return sinkattn.flash_attn_varlen_func(q, k, k, CU, CU, 5, 5, out=out)

    expected = function(q, k, torch.empty_like(q))
    out = torch.full_like(q, float("nan"))
    torch.compile(function, fullgraph=True, backend="aot_eager")(q, k, out)
    assert torch.equal(out, expected)


def counted(function, **options):
    counter = CompileCounterWithBackend("aot_eager")
    return counter, torch.compile(function, fullgraph=True, backend=counter, **options)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_dense_lengths_do_not_recompile(dynamic, requires_grad):
    def function(q, k, sink):
        return sinkattn.flash_attn_func(q, k, k, causal=True, learnable_sink=sink)

    counter, compiled = counted(function, dynamic=dynamic)
    sink = leaf(4, requires_grad=requires_grad)
    for n in LENGTHS:
        inputs = (leaf(2, n, 4, 64, requires_grad=requires_grad),
                  leaf(2, n + 3, 2, 64, requires_grad=requires_grad), sink)  # fmt: skip
        expected, found = with_gradients(function, inputs), with_gradients(compiled, inputs)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert counter.frame_count <= 2


def test_packed_lengths_do_not_recompile():
    def function(q, k, cu_seqlens, longest, sink):
        return sinkattn.flash_attn_varlen_func(
            q, k, k, cu_seqlens, cu_seqlens, longest, longest, causal=True, learnable_sink=sink
        )

    counter, compiled = counted(function)
    sink = leaf(4)
    for n in LENGTHS:
        cu_seqlens = torch.tensor([0, n, 2 * n], dtype=torch.int32)
        tensors = (leaf(2 * n, 4, 64), leaf(2 * n, 2, 64))

        def results(f, tensors=tensors, cu_seqlens=cu_seqlens, n=n):
            return with_gradients(lambda q, k, s: f(q, k, cu_seqlens, n, s), (*tensors, sink))

        for a, b in zip(results(function), results(compiled), strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count <= 2


def test_cache_lengths_do_not_recompile():
    q, cache = torch.randn(2, 1, 4, 64), torch.randn(2, 200, 2, 64)

    def function(length):
        return sinkattn.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=length)

    counter, compiled = counted(function)
    for n in LENGTHS:
        assert torch.equal(compiled(n), function(n))
    assert counter.frame_count <= 2


def test_forward_only_options_are_refused_while_tracing():
    q, v = leaf(1, 4, 2, 64), torch.randn(1, 4, 2, 256)

    def function(q, v):
        return sinkattn.flash_attn_func(q, q, v, qv=v)

    with pytest.raises((NotImplementedError, torch._dynamo.exc.Unsupported), match="qv"):
        torch.compile(function, fullgraph=True, backend="aot_eager")(q, v)


def test_double_backward_of_compiled_code_raises():
    function, inputs = dense()
    out = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    with pytest.raises(RuntimeError, match=r"once_differentiable|double backward|create_graph"):  # noqa: PT012
        (dq,) = torch.autograd.grad(
            out, inputs[0], torch.ones_like(out, requires_grad=True), create_graph=True
        )
        dq.sum().backward()


class Attention(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.sinks = torch.nn.Parameter(torch.randn(4))
        self.kind = kind

    def forward(self, q, k, v):
        if self.kind == "varlen":
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            return sinkattn.flash_attn_varlen_func(
                q, k, v, CU, CU, 5, 5, causal=True, learnable_sink=self.sinks
            )
        if self.kind == "packed":
            qkv = torch.cat([q, k, v], dim=2)
            return sinkattn.flash_attn_qkvpacked_func(qkv, num_heads_q=4, s_aux=self.sinks)
        out, lse = sinkattn.flash_attn_func(
            q, k, v, causal=True, return_attn_probs=True, learnable_sink=self.sinks
        )
        return out + lse.transpose(1, 2).unsqueeze(-1)


def sequence(n, requires_grad):
    return tuple(leaf(1, n, h, 64, requires_grad=requires_grad) for h in (4, 2, 2))


@pytest.mark.parametrize(
    "kind, strict, training",
    list(itertools.product(["dense", "varlen", "packed"], [False, True], [False, True])),
)
def test_exported_graph(kind, strict, training):
    """Values, and in training the gradients of q, k, v and the sink parameter."""
    module = Attention(kind)
    length = torch.export.Dim("length", min=9, max=512)
    shapes = ({1: length},) * 3
    with torch.set_grad_enabled(training):
        program = torch.export.export(
            module, sequence(11, False), strict=strict, dynamic_shapes=shapes
        )
        exported = program.module()
        inputs = sequence(33, training)
        expected, found = module(*inputs), exported(*inputs)
        assert torch.equal(expected, found)
        if not training:
            return
        seed = torch.randn_like(expected)
        wanted = torch.autograd.grad(expected, [*inputs, module.sinks], seed)
        gradients = torch.autograd.grad(found, [*inputs, exported.sinks], seed)
    for a, b in zip(wanted, gradients, strict=True):
        assert torch.equal(a, b)
    assert wanted[3].abs().max() > 0


def test_saved_program_runs(tmp_path):
    module = Attention("dense").requires_grad_(False)
    inputs = sequence(11, False)
    program = torch.export.export(module, inputs)
    torch.export.save(program, tmp_path / "attention.pt2")
    loaded = torch.export.load(tmp_path / "attention.pt2").module()
    assert torch.equal(loaded(*inputs), module(*inputs))


def test_inductor():
    function, inputs = dense(causal=True, return_attn_probs=True)
    compiled = torch.compile(function, fullgraph=True)
    for a, b in zip(
        with_gradients(function, inputs), with_gradients(compiled, inputs), strict=True
    ):
        assert torch.equal(a, b)
