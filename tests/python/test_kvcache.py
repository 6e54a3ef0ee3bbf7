# SPDX-License-Identifier: Apache-2.0
"""flash_attn_with_kvcache against the eager reference on the cache as it must be after the call."""

from __future__ import annotations

import pytest
import sinkattn
import torch
from support import close, pairwise

AXES = {
    "lengths": [(1, 128), (1, 339), (3, 1024), (16, 200), (64, 256)],
    "heads": [(8, 1), (6, 6), (12, 3)],
    "dims": [(64, 64), (128, 128), (192, 128), (256, 256)],
    "append": ["no", "equal", "longer", "ragged"],
    "mask": [
        {},
        {"causal": True},
        {"causal": True, "window_size": (40, 0)},
        {"window_size": (9, 9)},
    ],
    "rotary": ["none", "half", "full"],
    "interleaved": [True, False],
    "page_size": [None, 1, 3, 16, 64],
    "leftpad": [False, True],
    "batch_idx": [False, True],
    "num_splits": [0, 1, 3],
    "metadata": [False, True],
    "sink": [False, True],
    "dtype": ["fp32", "bf16"],
}
CASES = pairwise(AXES, seed=3)
BATCH = 3


def rotate(x, positions, cos, sin, interleaved):
    """x (s, h, d) rotated at `positions` (s,), in float64, rounded once to the dtype of x."""
    half = cos.shape[1]
    y = x.double().clone()
    c, s = cos.double()[positions][:, None], sin.double()[positions][:, None]
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    a, b = x.double()[..., first], x.double()[..., second]
    y[..., first] = a * c - b * s
    y[..., second] = a * s + b * c
    return y.to(x.dtype)


def dense_copy(cache, page_table, page_size):
    """The cache as (rows, capacity, hk, d)."""
    if page_table is None:
        return cache.clone()
    return cache[page_table.long()].flatten(1, 2).clone()


@pytest.mark.parametrize("index", range(len(CASES)))
def test_kvcache(index, device):
    case = CASES[index]
    g = torch.Generator().manual_seed(index)
    sq, capacity = case["lengths"]
    (h, hk), (d, dv) = case["heads"], case["dims"]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[case["dtype"]]
    if device == "cuda":
        dtype = torch.bfloat16

    def normal(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    rows = BATCH + 2 if case["batch_idx"] else BATCH
    page_size = case["page_size"]
    page_table = None
    if page_size:
        pages = -(-capacity // page_size)
        capacity = pages * page_size
        page_table = torch.randperm(rows * pages, generator=g).to(torch.int32).view(rows, pages)
        k_cache, v_cache = (
            normal(rows * pages, page_size, hk, d),
            normal(rows * pages, page_size, hk, dv),
        )
    else:
        k_cache, v_cache = normal(rows, capacity, hk, d), normal(rows, capacity, hk, dv)
    q = normal(BATCH, sq, h, d)
    room = 2 * sq + 5
    used = torch.randint(0, max(1, capacity - room), (BATCH,), generator=g, dtype=torch.int32)
    used[0] = max(0, capacity - room)
    options = dict(case["mask"], num_splits=case["num_splits"])
    index_of = torch.randperm(rows, generator=g)[:BATCH].to(torch.int32)
    row_of = index_of if case["batch_idx"] else torch.arange(BATCH, dtype=torch.int32)
    if case["batch_idx"]:
        options["cache_batch_idx"] = index_of
    pad = torch.zeros(BATCH, dtype=torch.int32)
    if case["leftpad"]:
        pad = (used // 3).to(torch.int32)
        options["cache_leftpad"] = pad
    if page_table is not None:
        options["page_table"] = page_table
    sink = torch.randn(h, generator=g) if case["sink"] else None
    options["learnable_sink"] = sink
    counts = [0] * BATCH
    new_k = new_v = None
    if case["append"] != "no":
        counts = [sq] * BATCH if case["append"] == "equal" else [2 * sq] * BATCH
        if case["append"] == "ragged":
            counts = [sq, 0, 2 * sq]
        new_k, new_v = normal(sum(counts), hk, d), normal(sum(counts), hk, dv)
    elif case["rotary"] != "none":
        pytest.skip("rotary needs new keys")
    expected_k = dense_copy(k_cache, page_table, page_size)
    expected_v = dense_copy(v_cache, page_table, page_size)
    q_expected, keys = q, new_k
    if case["rotary"] != "none":
        half = d // 2 if case["rotary"] == "full" else d // 4
        half -= half % 8
        angle = torch.randn(capacity + room, half, generator=g)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        options |= {
            "rotary_cos": cos,
            "rotary_sin": sin,
            "rotary_interleaved": case["interleaved"],
        }
        moving = bool(case["mask"])
        q_expected = torch.stack(
            [
                rotate(
                    q[b],
                    int(used[b])
                    + (torch.arange(sq) if moving else torch.zeros(sq, dtype=torch.long)),
                    cos,
                    sin,
                    case["interleaved"],
                )
                for b in range(BATCH)
            ]
        )
    start = 0
    for b in range(BATCH):
        n, u, row = counts[b], int(used[b]), int(row_of[b])
        if n:
            part = keys[start : start + n]
            if case["rotary"] != "none":
                part = rotate(part, u + torch.arange(n), cos, sin, case["interleaved"])
            expected_k[row, u : u + n] = part
            expected_v[row, u : u + n] = new_v[start : start + n]
        start += n
    if new_k is not None:
        if case["append"] == "ragged":
            options["cu_seqlens_k_new"] = torch.tensor([0, *torch.tensor(counts).cumsum(0)]).int()
        else:
            new_k, new_v = (x.view(BATCH, -1, hk, x.shape[-1]) for x in (new_k, new_v))
    total = used + torch.tensor(counts, dtype=torch.int32)
    if case["metadata"]:
        options["scheduler_metadata"] = sinkattn.get_scheduler_metadata(
            BATCH,
            sq,
            capacity,
            h,
            hk,
            d,
            used.to(device),
            headdim_v=dv,
            num_splits=case["num_splits"],
        )

    def place(x):
        return x.to(device) if isinstance(x, torch.Tensor) else x

    options = {name: place(value) for name, value in options.items()}
    k_device, v_device = k_cache.to(device), v_cache.to(device)
    out, lse = sinkattn.flash_attn_with_kvcache(
        place(q), k_device, v_device, place(new_k), place(new_v), cache_seqlens=place(used),
        return_softmax_lse=True, **options,
    )  # fmt: skip
    for actual, expected in ((k_device, expected_k), (v_device, expected_v)):
        actual = dense_copy(actual.cpu(), page_table, page_size)
        difference = (actual.double() - expected.double()).abs()
        ulp = torch.finfo(dtype).eps * expected.double().abs().clamp_min(1.0)
        assert bool((difference <= (0 if case["rotary"] == "none" else ulp)).all())
    truth = sinkattn.attention_reference(
        q_expected.double(),
        expected_k[row_of.long()].double(),
        expected_v[row_of.long()].double(),
        seqused_k=total,
        cache_leftpad=pad,
        learnable_sink=sink,
        **case["mask"],
    )
    close(
        {"out": out, "lse": lse},
        {"out": truth[0], "lse": truth[1]},
        rtol=1e-5 if dtype == torch.float32 else 2e-2,
    )


def dtype_of(device):
    return torch.bfloat16 if device == "cuda" else torch.float32


def cache(device, rows=2, capacity=50):
    g = torch.Generator().manual_seed(0)
    dtype = dtype_of(device)
    q = torch.randn(2, 1, 4, 64, generator=g).to(dtype).to(device)
    k = torch.randn(rows, capacity, 2, 64, generator=g).to(dtype).to(device)
    v = torch.randn(rows, capacity, 2, 64, generator=g).to(dtype).to(device)
    return q, k, v


def test_integer_length_and_out(device):
    q, k, v = cache(device)
    lengths = torch.full((2,), 17, dtype=torch.int32, device=device)
    expected = sinkattn.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, num_splits=1)
    out = torch.full_like(expected, float("nan"))
    result = sinkattn.flash_attn_with_kvcache(q, k, v, cache_seqlens=17, num_splits=1, out=out)
    assert result.data_ptr() == out.data_ptr()
    assert torch.equal(out, expected)


def test_writes_past_the_capacity_are_dropped(device):
    q, k, v = cache(device)
    new = torch.ones(2, 8, 2, 64, device=device, dtype=k.dtype)
    before = k.clone()
    lengths = torch.tensor([46, 10], dtype=torch.int32, device=device)
    out = sinkattn.flash_attn_with_kvcache(q, k, v, new, new, cache_seqlens=lengths)
    assert out.isfinite().all()
    assert torch.equal(k[0, :46], before[0, :46])
    assert (k[0, 46:] == 1).all()
    assert (k[1, 10:18] == 1).all()
    assert torch.equal(k[1, 18:], before[1, 18:])


@pytest.mark.parametrize("value", [-1, -(2**31), 2**31 - 1, 10**6])
def test_untrusted_indices(value, device):
    """Lengths, pages, rows and left padding of any value stay inside the cache."""
    q, k, v = cache(device)
    wild = torch.full((2,), value, dtype=torch.int32, device=device)
    fair = torch.full((2,), 20, dtype=torch.int32, device=device)
    assert sinkattn.flash_attn_with_kvcache(q, k, v, cache_seqlens=wild).isfinite().all()
    for name in ("cache_batch_idx", "cache_leftpad"):
        out = sinkattn.flash_attn_with_kvcache(q, k, v, cache_seqlens=fair, **{name: wild})
        assert out.isfinite().all()
    pages = torch.full((2, 4), value, dtype=torch.int32, device=device)
    paged = sinkattn.flash_attn_with_kvcache(
        q, k.view(10, 10, 2, 64), v.view(10, 10, 2, 64), cache_seqlens=fair, page_table=pages
    )
    assert paged.isfinite().all()


def test_unused_slots_never_matter(device):
    q, k, v = cache(device)
    lengths = torch.tensor([20, 33], dtype=torch.int32, device=device)
    pad = torch.tensor([3, 0], dtype=torch.int32, device=device)
    clean = sinkattn.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, cache_leftpad=pad)
    for garbage in (float("nan"), float("inf"), 1e30):
        k2, v2 = k.clone(), v.clone()
        for x in (k2, v2):
            x[0, 20:], x[1, 33:], x[0, :3] = garbage, garbage, garbage
        out = sinkattn.flash_attn_with_kvcache(q, k2, v2, cache_seqlens=lengths, cache_leftpad=pad)
        assert torch.equal(out, clean)


def test_page_table_tails(device):
    q, k, v = cache(device, capacity=48)
    lengths = torch.tensor([20, 40], dtype=torch.int32, device=device)
    table = torch.arange(6, dtype=torch.int32, device=device).view(2, 3)
    pages = (k.view(6, 16, 2, 64), v.view(6, 16, 2, 64))
    expected = sinkattn.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, num_splits=1)
    for tail in (-1, 2**31 - 1):
        table[0, 2] = tail
        out = sinkattn.flash_attn_with_kvcache(
            q, *pages, cache_seqlens=lengths, page_table=table, num_splits=1
        )
        assert torch.equal(out, expected)


def test_varlen_queries(device):
    _, k, v = cache(device)
    q = torch.randn(7, 4, 64, device=device, dtype=k.dtype)
    cu = torch.tensor([0, 5, 7], dtype=torch.int32, device=device)
    lengths = torch.tensor([20, 33], dtype=torch.int32, device=device)
    sink = torch.randn(4, device=device)
    out = sinkattn.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=lengths, cu_seqlens_q=cu, max_seqlen_q=5, causal=True,
        learnable_sink=sink,
    )  # fmt: skip
    truth, _ = sinkattn.attention_reference(
        q.double(), k.double(), v.double(), cu_seqlens_q=cu, seqused_k=lengths, causal=True,
        learnable_sink=sink,
    )  # fmt: skip
    tolerance = 1e-2 if device == "cuda" else 1e-5
    torch.testing.assert_close(out.double(), truth, rtol=tolerance, atol=tolerance)


def test_e4m3(device, needs):
    needs("e4m3")
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 40, h, 64, generator=g) for h in (4, 2, 2))
    q, k, v = (x.to(torch.float8_e4m3fn).to(device) for x in (q, k, v))
    scales = {
        f"{name}_descale": torch.rand(2, 2, generator=g).add(0.5).to(device) for name in "qkv"
    }
    sink = torch.randn(4, generator=g).to(device)
    out, lse = sinkattn.flash_attn_func(
        q, k, v, causal=True, return_attn_probs=True, learnable_sink=sink, **scales
    )
    truth, lse_truth = sinkattn.attention_reference(
        q.double(), k.double(), v.double(), causal=True, learnable_sink=sink, **scales
    )
    assert out.dtype == torch.bfloat16
    close({"out": out, "lse": lse}, {"out": truth, "lse": lse_truth}, rtol=4e-3)


def test_query_v(device, needs):
    needs("query_v")
    g = torch.Generator().manual_seed(0)
    for dtype in (torch.float64, torch.bfloat16):
        q = torch.randn(2, 9, 4, 64, generator=g).to(dtype).to(device)
        qv = torch.randn(2, 9, 4, 512, generator=g).to(dtype).to(device)
        k = torch.randn(2, 70, 1, 64, generator=g).to(dtype).to(device)
        v = torch.randn(2, 70, 1, 512, generator=g).to(dtype).to(device)
        sink = torch.randn(4, generator=g).to(device)
        out, lse = sinkattn.flash_attn_func(
            q, k, v, causal=True, qv=qv, return_attn_probs=True, learnable_sink=sink
        )
        truth, lse_truth = sinkattn.attention_reference(
            q.double(), k.double(), v.double(), causal=True, qv=qv.double(), learnable_sink=sink
        )
        rtol = 1e-12 if dtype == torch.float64 else 1e-2
        close({"out": out, "lse": lse}, {"out": truth, "lse": lse_truth}, rtol=rtol)
