# SPDX-License-Identifier: Apache-2.0
"""Signatures, errors, layouts, private names: what callers rely on beside the numbers."""

from __future__ import annotations

import inspect

import pytest
import sinkattn
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sinkattn import interface

# The positional parameters of FlashAttention-3 3.0.0, which must stay as they are.
FA3 = {
    "flash_attn_func": "q k v softmax_scale causal qv q_descale k_descale v_descale window_size "
    "attention_chunk softcap num_splits pack_gqa deterministic sm_margin return_attn_probs",
    "flash_attn_varlen_func": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k seqused_q "
    "seqused_k softmax_scale causal qv q_descale k_descale v_descale window_size attention_chunk "
    "softcap num_splits pack_gqa deterministic sm_margin return_attn_probs",
    "flash_attn_qkvpacked_func": "qkv softmax_scale causal q_descale k_descale v_descale window_size "
    "attention_chunk softcap deterministic num_heads_q sm_margin return_attn_probs",
    "flash_attn_with_kvcache": "q k_cache v_cache k v qv rotary_cos rotary_sin cache_seqlens "
    "cache_batch_idx cache_leftpad page_table cu_seqlens_q cu_seqlens_k_new max_seqlen_q "
    "rotary_seqlens q_descale k_descale v_descale softmax_scale causal window_size attention_chunk "
    "softcap rotary_interleaved scheduler_metadata num_splits pack_gqa sm_margin "
    "return_softmax_lse",
    "flash_attn_combine": "out_partial lse_partial out out_dtype",
    "get_scheduler_metadata": "batch_size max_seqlen_q max_seqlen_k num_heads_q num_heads_kv headdim "
    "cache_seqlens qkv_dtype headdim_v cu_seqlens_q cu_seqlens_k_new cache_leftpad page_size "
    "max_seqlen_k_new causal window_size attention_chunk has_softcap num_splits pack_gqa sm_margin",
}


@pytest.mark.parametrize("name", FA3)
def test_positional_prefix_is_fa3(name):
    parameters = inspect.signature(getattr(sinkattn, name)).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == FA3[name].split()


@pytest.mark.parametrize(
    "name", [n for n in sinkattn.__all__ if n.startswith(("flash", "merge", "attention"))]
)
def test_the_sink_is_last_and_keyword_only(name):
    parameters = list(inspect.signature(getattr(sinkattn, name)).parameters.values())
    assert [p.name for p in parameters[-3:]] == ["s_aux", "sinks", "learnable_sink"]
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[-3:])


def normal(*shape):
    return torch.randn(*shape)


def dense(dtype=torch.float32, h=4, hk=2, d=64):
    return torch.randn(2, 9, h, d, dtype=dtype), *(
        torch.randn(2, 12, hk, d, dtype=dtype) for _ in range(2)
    )


def test_aliases():
    q, k, v = dense()
    sink = torch.randn(4)
    results = [
        sinkattn.flash_attn_func(q, k, v, **{name: sink})
        for name in ("learnable_sink", "s_aux", "sinks")
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    with pytest.raises(TypeError, match="s_aux: expected one name for the sink"):
        sinkattn.flash_attn_func(q, k, v, s_aux=sink, learnable_sink=sink)
    with pytest.raises(TypeError):
        sinkattn.flash_attn_func(q, k, v, None, False, *[None] * 12, sink)


ERRORS = [
    (TypeError, "q: expected a tensor, got list", {"q": [1]}),
    (TypeError, "k: expected the dtype of q, float32, got bfloat16", {"k": torch.bfloat16}),
    (TypeError, "q: expected float64, float32.* got Long", {"q": torch.int64}),
    (ValueError, "q: expected 4 dimensions, got 3", {"q": normal(2, 4, 64)}),
    (ValueError, "v: expected size 12 in dimension 1, got 11", {"v": normal(2, 11, 2, 64)}),
    (ValueError, r"q: expected a number of heads .* 2 heads of k, got 3", {"q": normal(2, 9, 3, 64)}),
    (ValueError, "q: expected a head dim in .* got 12",
     {"q": normal(2, 9, 4, 12), "k": normal(2, 12, 2, 12)}),
    (ValueError, "v: expected a head dim in .* got 264", {"v": normal(2, 12, 2, 520)[..., :264],
     "q": normal(2, 9, 4, 128), "k": normal(2, 12, 2, 128)}),
    (ValueError, "softmax_scale: expected a finite number > 0, got 0", {"softmax_scale": 0.0}),
    (ValueError, "softmax_scale: expected a finite number > 0", {"softmax_scale": float("nan")}),
    (TypeError, "softmax_scale: expected a number", {"softmax_scale": "x"}),
    (ValueError, "softcap: expected a finite number >= 0, got -1", {"softcap": -1.0}),
    (ValueError, r"num_splits: expected an integer in \[0, 256\], got 257", {"num_splits": 257}),
    (ValueError, "attention_chunk: expected an integer >= 0, got -3", {"attention_chunk": -3}),
    (ValueError, "sm_margin: expected an integer >= 0, got -1", {"sm_margin": -1}),
    (TypeError, "causal: expected a bool, got int", {"causal": 1}),
    (TypeError, r"window_size: expected \(left, right\) or None", {"window_size": 5}),
    (ValueError, "learnable_sink: expected size 4 in dimension 0, got 3", {"learnable_sink": torch.zeros(3)}),
    (ValueError, "learnable_sink: expected 1 dimensions, got 2", {"learnable_sink": torch.zeros(4, 1)}),
    (TypeError, "learnable_sink: expected float32, bfloat16 or float16", {"learnable_sink": torch.zeros(4, dtype=torch.int32)}),
    (TypeError, "learnable_sink: expected float32", {"learnable_sink": torch.zeros(4, dtype=torch.float64)}),
    (ValueError, "q_descale: expected none unless q is float8_e4m3", {"q_descale": torch.ones(2, 2)}),
    (ValueError, "qv: expected a q head dim <= 64 and a v head dim >= 256", {"qv": torch.ones(2, 9, 4, 64)}),
    (TypeError, "dropout_p", {"dropout_p": 0.1}),
    (TypeError, "alibi_slopes", {"alibi_slopes": torch.zeros(4)}),
]  # fmt: skip


def error_id(part):
    """Names free of tensor values: every worker must collect the same tests."""
    return "+".join(part) if isinstance(part, dict) else getattr(part, "__name__", part)[:40]


@pytest.mark.parametrize(("error", "text", "change"), ERRORS, ids=error_id)
def test_errors(error, text, change):
    q, k, v = dense()
    arguments = {"q": q, "k": k, "v": v}
    for name, value in change.items():
        arguments[name] = arguments[name].to(value) if isinstance(value, torch.dtype) else value
    with pytest.raises(error, match=text):
        sinkattn.flash_attn_func(**arguments)


def test_varlen_errors():
    q, k, v = (torch.randn(9, h, 64) for h in (4, 2, 2))
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    call = sinkattn.flash_attn_varlen_func
    with pytest.raises(TypeError, match="cu_seqlens_q: expected int32, got"):
        call(q, k, v, cu.float(), cu, 5, 5)
    with pytest.raises(ValueError, match="cu_seqlens_k: expected size 3 in dimension 0, got 2"):
        call(q, k, v, cu, cu[:2], 5, 5)
    with pytest.raises(ValueError, match="max_seqlen_q: expected a length"):
        call(q, k, v, cu, cu, None, 5)
    with pytest.raises(ValueError, match="seqused_k: expected size 2"):
        call(q, k, v, cu, cu, 5, 5, seqused_k=cu)
    with pytest.raises(ValueError, match="cu_seqlens_k: expected none together with page_table"):
        call(q, k[None], v[None], cu, cu, 5, 5, page_table=torch.zeros(2, 1, dtype=torch.int32))
    assert torch.equal(
        call(q, k, v, cu, cu, torch.tensor(5), torch.tensor(5)), call(q, k, v, cu, cu, 5, 5)
    )


def test_cache_errors():
    q, k, v = torch.randn(2, 1, 4, 64), torch.randn(2, 20, 2, 64), torch.randn(2, 20, 2, 64)
    new = torch.randn(2, 1, 2, 64)
    call = sinkattn.flash_attn_with_kvcache
    with pytest.raises(ValueError, match="k: expected new k and v together"):
        call(q, k, v, new)
    with pytest.raises(ValueError, match="cache_seqlens: expected the used lengths"):
        call(q, k, v, new, new)
    with pytest.raises(ValueError, match="rotary_cos: expected new k and v"):
        call(q, k, v, rotary_cos=torch.ones(20, 8), rotary_sin=torch.ones(20, 8))
    with pytest.raises(ValueError, match="rotary_cos: expected a rotary dim"):
        call(q, k, v, new, new, rotary_cos=torch.ones(20, 5), rotary_sin=torch.ones(20, 5),
             cache_seqlens=3)  # fmt: skip
    with pytest.raises(ValueError, match="page_table: expected seqused_k or cache_seqlens"):
        call(q, k, v, page_table=torch.zeros(2, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match="scheduler_metadata: expected size 5"):
        call(q, k, v, cache_seqlens=3, scheduler_metadata=torch.zeros(9, dtype=torch.int32))
    with pytest.raises(NotImplementedError, match="k_cache: expected no input that requires grad"):
        call(q.requires_grad_(), k, v, cache_seqlens=3)


def test_forward_only_options_refuse_gradients():
    q, k = torch.randn(1, 4, 2, 64, requires_grad=True), torch.randn(1, 4, 2, 64)
    v = torch.randn(1, 4, 2, 256)
    with pytest.raises(NotImplementedError, match="qv: expected no input that requires grad"):
        sinkattn.flash_attn_func(q, k, v, qv=torch.randn(1, 4, 2, 256))
    cu = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="out: expected None where an input requires grad"):
        sinkattn.flash_attn_varlen_func(q[0], k[0], k[0], cu, cu, 4, 4, out=torch.empty(4, 2, 64))


def test_sm_margin_with_a_gradient(device):
    """The backward on CUDA uses every SM and says so in the forward; without a gradient it works."""
    q = torch.randn(1, 40, 2, 64).to(device, torch.bfloat16)
    expected = sinkattn.flash_attn_func(q, q, q)
    assert torch.equal(sinkattn.flash_attn_func(q, q, q, sm_margin=8), expected)
    leaf = q.clone().requires_grad_()
    if device == "cpu":
        sinkattn.flash_attn_func(leaf, q, q, sm_margin=8).float().sum().backward()
        assert leaf.grad is not None
        return
    with pytest.raises(NotImplementedError, match="sm_margin: expected no input that requires"):
        sinkattn.flash_attn_func(leaf, q, q, sm_margin=8)


def test_double_backward_raises():
    q, k, v = (x.requires_grad_() for x in dense())
    out = sinkattn.flash_attn_func(q, k, v)
    dout = torch.randn_like(out, requires_grad=True)
    (dq,) = torch.autograd.grad(out, q, dout, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_in_place_changes_are_noticed():
    q, k, v = (x.requires_grad_() for x in dense())
    out = sinkattn.flash_attn_func(q, k, v)
    with torch.no_grad():
        out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize(
    "layout", ["bhsd", "interleaved", "sliced heads", "expanded", "reversed dim", "offset"]
)
def test_layouts(layout, device):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 30, 4, 64, generator=g).bfloat16().to(device)
    k, v = (torch.randn(2, 30, 4, 64, generator=g).bfloat16().to(device) for _ in range(2))
    dout = torch.randn(2, 30, 4, 64, generator=g).bfloat16().to(device)

    def change(x):
        if layout == "bhsd":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "interleaved":
            return torch.stack([x, x + 1], dim=2)[:, :, 0]
        if layout == "sliced heads":
            return torch.cat([x + 1, x], dim=2)[:, :, 4:]
        if layout == "expanded":
            return x[:1].expand(2, -1, -1, -1)
        if layout == "reversed dim":
            return x.transpose(2, 3).contiguous().transpose(2, 3)
        return torch.cat([x.new_zeros(3), x.flatten()])[3:].view_as(x)

    inputs = [change(x) for x in (q, k, v, dout)]
    expected = [x.contiguous() for x in inputs]

    def gradients(q, k, v, dout):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = sinkattn.flash_attn_func(*leaves, causal=True)
        return (out, *torch.autograd.grad(out, leaves, dout))

    for a, b in zip(gradients(*inputs), gradients(*expected), strict=True):
        assert torch.equal(a, b)


def test_expanded_output_gradient(device):
    q, k, v = (x.bfloat16().to(device).requires_grad_() for x in dense())
    sinkattn.flash_attn_func(q, k, v).sum().backward()  # dout is a stride-0 expansion
    assert q.grad.isfinite().all()


def test_strided_sink(device):
    q, k, v = (x.bfloat16().to(device) for x in dense())
    wide = torch.randn(8, device=device)
    a = sinkattn.flash_attn_func(q, k, v, learnable_sink=wide[::2])
    b = sinkattn.flash_attn_func(q, k, v, learnable_sink=wide[::2].contiguous())
    assert torch.equal(a, b)


def test_private_names():
    q, k, v = dense()
    sink = torch.randn(4)
    out, lse, *rest = interface._flash_attn_forward(q, k, v, causal=True, learnable_sink=sink)
    assert len(rest) == 2
    same, lse_same, *_ = interface._flash_attn_forward(
        q, k, v, causal=True, out=torch.empty_like(out), window_size=(-1, -1), s_aux=sink
    )
    assert torch.equal(out, same)
    assert torch.equal(lse, lse_same)
    leaves = [x.requires_grad_() for x in (q, k, v, sink)]
    expected = sinkattn.flash_attn_func(*leaves[:3], causal=True, learnable_sink=sink)
    dout = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, leaves, dout)
    found = [torch.empty_like(x) for x in (q, k, v)]
    d, dsink = interface._flash_attn_backward(
        dout, q, k, v, out, lse, dq=found[0], dk=found[1], dv=found[2], causal=True,
        window_size=(-1, -1), learnable_sink=sink,
    )  # fmt: skip
    for a, b in zip((*found, dsink), gradients, strict=True):
        assert torch.equal(a, b)
    assert d.shape == (2, 4, 128)
    torch.testing.assert_close(d[..., :9], (dout * out).sum(-1).transpose(1, 2))
    assert (d[..., 9:] == 0).all()


def test_explain():
    q, k, v = dense()
    text = sinkattn.explain(sinkattn.flash_attn_func, q, k, v, causal=True)
    assert text.startswith("kernel cpu_forward_")
    assert "workspace" in text
    with pytest.raises(ValueError, match="softcap"):
        sinkattn.explain(sinkattn.flash_attn_func, q, k, v, softcap=-1.0)
    with pytest.raises(TypeError, match="function"):
        sinkattn.explain(print, "x")


def test_info():
    facts = sinkattn.build_info()
    assert facts["version"] == sinkattn.__version__
    assert sinkattn.is_available() == (facts["cuda_unavailable"] is None)


def test_metadata_is_read_only_and_small():
    for b in (0, 1, 5, 64):
        lengths = torch.full((b,), 100, dtype=torch.int32)
        metadata = sinkattn.get_scheduler_metadata(b, 1, 4096, 64, 8, 64, lengths)
        assert metadata.dtype == torch.int32
        assert metadata.numel() <= 4 * ((b + 3) // 4 * 4) + 1


NUMBERS = st.one_of(st.integers(-3, 300), st.floats(allow_nan=True), st.none(), st.booleans())
SHAPES = st.lists(st.integers(0, 9), min_size=0, max_size=6)
KINDS = st.sampled_from([torch.float32, torch.bfloat16, torch.int32, torch.float64, torch.int64])


@settings(max_examples=300, deadline=None)
@given(
    shapes=st.tuples(SHAPES, SHAPES, SHAPES), kind=KINDS, sink=st.one_of(st.none(), SHAPES),
    softcap=NUMBERS, scale=NUMBERS, window=st.tuples(NUMBERS, NUMBERS), splits=NUMBERS, chunk=NUMBERS,
)  # fmt: skip
def test_any_argument_gives_a_result_or_an_error(
    shapes, kind, sink, softcap, scale, window, splits, chunk
):
    q, k, v = (torch.ones([*s[:-1], 8 * s[-1]] if s else s, dtype=kind) for s in shapes)
    try:
        out = sinkattn.flash_attn_func(
            q, k, v, softmax_scale=scale, softcap=softcap, window_size=window, num_splits=splits,
            attention_chunk=chunk, learnable_sink=None if sink is None else torch.ones(sink),
        )  # fmt: skip
    except (TypeError, ValueError, NotImplementedError) as error:
        assert ": expected " in str(error)  # noqa: PT017
    else:
        assert out.shape[:-1] == q.shape[:-1]
