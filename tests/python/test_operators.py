# SPDX-License-Identifier: Apache-2.0
"""The torch operators: schemas, fake implementations, registration, errors."""

from __future__ import annotations

import pytest
import torch
from sinkattn._ops import ops, translate
from torch.library import opcheck

FORWARD = (
    "Tensor? qv=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, SymInt? max_seqlen_q=None, "
    "SymInt? max_seqlen_k=None, Tensor? page_table=None, Tensor? cache_batch_idx=None, "
    "Tensor? cache_leftpad=None, Tensor? q_descale=None, Tensor? k_descale=None, "
    "Tensor? v_descale=None, float? softmax_scale=None, bool causal=False, int window_left=-1, "
    "int window_right=-1, int attention_chunk=0, float softcap=0., "
    "Tensor? scheduler_metadata=None, int num_splits=1, bool? pack_gqa=None, int sm_margin=0, "
    "Tensor? learnable_sink=None"
)
DENSE = (
    "Tensor q, Tensor k, Tensor v, Tensor? learnable_sink=None, float? softmax_scale=None, "
    "bool causal=False, int window_left=-1, int window_right=-1"
)
BACKWARD = (
    "Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? seqused_q=None, "
    "Tensor? seqused_k=None, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, "
    "float? softmax_scale=None, bool causal=False, int window_left=-1, int window_right=-1, "
    "int attention_chunk=0, float softcap=0., bool deterministic=False, int sm_margin=0, "
    "bool need_dq=True, bool need_dkv=True, Tensor? learnable_sink=None"
)
# A released schema changes only by appending arguments with defaults.
SCHEMAS = {
    "fwd": f"(Tensor q, Tensor k, Tensor v, {FORWARD}) -> (Tensor out, Tensor softmax_lse)",
    "fwd_dense": f"({DENSE}) -> (Tensor out, Tensor softmax_lse)",
    "fwd_dense_no_lse": f"({DENSE}) -> Tensor out",
    "attention": f"(Tensor q, Tensor k, Tensor v, {FORWARD}, bool deterministic=False)"
    " -> (Tensor out, Tensor softmax_lse)",
    "fwd_out": f"(Tensor(a!) out, Tensor q, Tensor k, Tensor v, {FORWARD}) -> Tensor softmax_lse",
    "fwd_kvcache": "(Tensor(a!) out, Tensor q, Tensor(b!) k_cache, Tensor(c!) v_cache, "
    "Tensor k_new, Tensor v_new, Tensor? cu_seqlens_k_new=None, Tensor? rotary_cos=None, "
    "Tensor? rotary_sin=None, Tensor? rotary_seqlens=None, bool rotary_interleaved=True, "
    f"{FORWARD}) -> Tensor softmax_lse",
    "bwd": f"({BACKWARD}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsink)",
    "bwd_out": f"(Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, {BACKWARD})"
    " -> (Tensor softmax_d, Tensor dsink)",
    "combine": "(Tensor out_partial, Tensor lse_partial, ScalarType? out_dtype=None, "
    "Tensor? learnable_sink=None) -> (Tensor out, Tensor softmax_lse)",
    "combine_out": "(Tensor(a!) out, Tensor out_partial, Tensor lse_partial, "
    "Tensor? learnable_sink=None) -> Tensor softmax_lse",
    "get_scheduler_metadata": "(SymInt batch_size, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "int num_heads_q, int num_heads_kv, int headdim, int headdim_v, ScalarType qkv_dtype, "
    "Tensor cache_seqlens, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k_new=None, "
    "Tensor? cache_leftpad=None, int? page_size=None, int max_seqlen_k_new=0, bool causal=False, "
    "int window_left=-1, int window_right=-1, int attention_chunk=0, bool has_softcap=False, "
    "int num_splits=0, bool? pack_gqa=None, int sm_margin=0) -> Tensor",
    "explain_fwd": f"(Tensor q, Tensor k, Tensor v, {FORWARD}) -> str",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name):
    assert str(getattr(ops, name).default._schema) == f"sinkattn::{name}{SCHEMAS[name]}"


def registered_operators() -> set[str]:
    names = torch._C._dispatch_get_all_op_names()
    return {n.removeprefix("sinkattn::") for n in names if n.startswith("sinkattn::")}


def test_every_operator_is_in_the_snapshot():
    assert registered_operators() == set(SCHEMAS)


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("key", ["CPU", "CUDA"])
def test_backends_are_registered(name, key):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sinkattn::{name}", key)


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def index(*values):
    return torch.tensor(values, dtype=torch.int32)


def dense(dtype=torch.float32):
    return (
        normal(2, 9, 4, 64, dtype=dtype),
        normal(2, 12, 2, 64, dtype=dtype),
        normal(2, 12, 2, 32, dtype=dtype),
    )


def packed():
    return normal(11, 4, 64), normal(13, 2, 64), normal(13, 2, 32)


PACKED_OPTIONS = {
    "cu_seqlens_q": index(0, 5, 9),
    "cu_seqlens_k": index(0, 8, 13),
    "max_seqlen_q": 5,
    "max_seqlen_k": 8,
}


def backward_case(q, k, v, **options):
    """Arguments of bwd from dout to softmax_lse."""
    out, lse = ops.fwd(q, k, v, **options)
    return torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse


def cases():
    sink = normal(4)
    q, k, v = dense()
    p = packed()
    out = torch.empty(2, 9, 4, 32)
    gradients = tuple(torch.empty_like(x) for x in (q, k, v))
    packed_gradients = tuple(torch.empty_like(x) for x in p)
    cache = (normal(2, 30, 2, 64), normal(2, 30, 2, 32))
    new = (normal(2, 9, 2, 64), normal(2, 9, 2, 32))
    pages = (normal(8, 4, 2, 64), normal(8, 4, 2, 32))
    rotary = {"rotary_cos": normal(40, 16), "rotary_sin": normal(40, 16)}
    table = {"page_table": index(*range(8)).view(2, 4), "seqused_k": index(7, 12)}
    partial = (normal(3, 2, 5, 4, 64), normal(3, 2, 5, 4))
    packed_partial = (normal(3, 7, 4, 64), normal(3, 7, 4))
    yield "dense", "fwd", (q, k, v), {"causal": True, "learnable_sink": sink}
    yield "bf16 sink", "fwd", (q, k, v), {"learnable_sink": sink.bfloat16()}
    yield "fp64", "fwd", dense(torch.float64), {"softcap": 3.0}
    yield "bf16", "fwd", dense(torch.bfloat16), {"window_left": 3, "num_splits": 0}
    # No e4m3 here: opcheck compares its inputs with allclose, which torch lacks for that dtype.
    views = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    yield "bhsd views", "fwd", views, {}
    yield "packed", "fwd", p, PACKED_OPTIONS
    yield "paged", "fwd", (q, *pages), table
    yield "no queries", "fwd", (q[:, :0], k, v), {"learnable_sink": sink}
    yield "no keys", "fwd", (q, k[:, :0], v[:, :0]), {}
    yield "sink", "fwd_dense", (q, k, v, sink.bfloat16(), 0.2, True, 3, -1), {}
    yield "bhsd views", "fwd_dense", views, {}
    yield "no queries", "fwd_dense", (q[:, :0], k, v), {}
    yield "sink", "fwd_dense_no_lse", (q, k, v, sink), {"causal": True}
    yield "sink", "attention", (q, k, v), {"learnable_sink": sink}
    yield (
        "with grad",
        "attention",
        tuple(x.clone().requires_grad_() for x in (q, k, v)),
        {"learnable_sink": sink.clone().requires_grad_(), "causal": True, "deterministic": True},
    )
    yield "dense", "fwd_out", (out, q, k, v), {"causal": True}
    yield (
        "append",
        "fwd_kvcache",
        (out, q, *cache, *new),
        {"seqused_k": index(3, 20), "causal": True},
    )
    yield "rotary", "fwd_kvcache", (out, q, *cache, *new), {"seqused_k": index(3, 5)} | rotary
    yield "all", "bwd", backward_case(q, k, v), {"learnable_sink": sink}
    yield "no sink", "bwd", backward_case(q, k, v, causal=True), {"causal": True}
    only_sink = {"need_dq": False, "need_dkv": False, "learnable_sink": sink}
    yield "sink alone", "bwd", backward_case(q, k, v), only_sink
    yield "lse alone", "bwd", (None, *backward_case(q, k, v)[1:]), {"need_dkv": False}
    yield "packed", "bwd", backward_case(*p, **PACKED_OPTIONS), PACKED_OPTIONS
    yield "dense", "bwd_out", (*gradients, *backward_case(q, k, v)), {"learnable_sink": sink}
    packed_backward = (*packed_gradients, *backward_case(*p, **PACKED_OPTIONS))
    yield "packed", "bwd_out", packed_backward, PACKED_OPTIONS
    yield "dense", "combine", partial, {"learnable_sink": sink}
    yield "packed", "combine", packed_partial, {"out_dtype": torch.bfloat16}
    yield "dense", "combine_out", (torch.empty(2, 5, 4, 64), *partial), {"learnable_sink": sink}
    facts = (2, 1, 50, 4, 2, 64, 64, torch.bfloat16, index(3, 5))
    yield "batch 2", "get_scheduler_metadata", facts, {}


CASES = [pytest.param(*rest, id=f"{rest[0]}-{name}") for name, *rest in cases()]
# No Tensor in its result: traced code refuses it, and explain() is never traced.
EAGER_ONLY = {"explain_fwd"}


@pytest.mark.parametrize("name, arguments, options", CASES)
def test_opcheck(name, arguments, options):
    opcheck(getattr(ops, name).default, arguments, options)


def test_every_operator_is_checked():
    assert {case.values[0] for case in CASES} | EAGER_ONLY == set(SCHEMAS)


@pytest.mark.parametrize("name, arguments, options", CASES)
def test_fake_equals_real(name, arguments, options):
    """Shape, dtype and strides of every result, without data."""
    real = getattr(ops, name)(*arguments, **options)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def fake(x):
            return mode.from_tensor(x) if isinstance(x, torch.Tensor) else x

        faked = getattr(ops, name)(
            *(fake(x) for x in arguments), **{n: fake(x) for n, x in options.items()}
        )
    pairs = zip(real, faked, strict=True) if isinstance(real, tuple) else [(real, faked)]
    for a, b in pairs:
        assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)


def test_results_are_fresh():
    """No result shares memory with an argument or with another result."""
    q, k, v = dense()
    sink = normal(4)
    out, lse = ops.fwd(q, k, v, learnable_sink=sink)
    results = [
        out,
        lse,
        *ops.bwd(torch.ones_like(out), None, q, k, v, out, lse, learnable_sink=sink),
    ]
    tensors = [q, k, v, sink, *results]
    addresses = [x.untyped_storage().data_ptr() for x in tensors]
    assert len(set(addresses)) == len(addresses)


def test_gradients_that_are_not_needed_are_empty():
    q, k, v = dense()
    out, lse = ops.fwd(q, k, v)
    arguments = (torch.ones_like(out), None, q, k, v, out, lse)
    dq, dk, dv, dsink = ops.bwd(*arguments, need_dkv=False)
    assert [tuple(x.shape) for x in (dq, dk, dv, dsink)] == [tuple(q.shape), (0,), (0,), (0,)]
    dq, dk, dv, dsink = ops.bwd(*arguments, need_dq=False, learnable_sink=normal(4))
    assert [tuple(x.shape) for x in (dq, dk, dv, dsink)] == [(0,), k.shape, v.shape, (4,)]


def test_the_operator_with_a_gradient_equals_the_public_function():
    import sinkattn

    leaves = [x.requires_grad_() for x in (*dense(), normal(4))]
    results = {}
    for name, function in (("public", sinkattn.flash_attn_func), ("operator", ops.attention)):
        options = {"return_attn_probs": True} if name == "public" else {}
        out, lse = function(*leaves[:3], causal=True, learnable_sink=leaves[3], **options)
        seeds = [normal(*out.shape), normal(*lse.shape)]
        results[name] = [out, lse, *torch.autograd.grad([out, lse], leaves, seeds)]
    for a, b in zip(*results.values(), strict=True):
        assert torch.equal(a, b)


def test_operators_raise_named_errors():
    q, k, v = dense()
    with pytest.raises(
        RuntimeError, match=r"sinkattn: ValueError: softcap: expected .* got"
    ) as error:
        ops.fwd(q, k, v, softcap=-1.0)
    mapped = translate(error.value)
    assert type(mapped) is ValueError
    assert str(mapped).startswith("softcap: expected")
    assert translate(RuntimeError("out of memory")) is None


def test_a_refused_append_changes_nothing():
    q, k_cache, v_cache = normal(2, 1, 4, 64), normal(2, 30, 2, 64), normal(2, 30, 2, 64)
    new = torch.ones(2, 1, 2, 64)
    before = k_cache.clone()
    with pytest.raises(RuntimeError, match="softcap"):
        ops.fwd_kvcache(
            torch.empty_like(q), q, k_cache, v_cache, new, new, seqused_k=index(3, 4), softcap=-1.0
        )
    assert torch.equal(k_cache, before)
