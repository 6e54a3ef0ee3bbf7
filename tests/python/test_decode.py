# SPDX-License-Identifier: Apache-2.0
"""Few queries, a long cache: splits and sinks, hostile lengths and pages, poisoned memory."""

from __future__ import annotations

import math

import pytest
import sinkattn
import torch
from caches import INF, NAN, Cache, check, ints, make_sink


@pytest.mark.parametrize("splits", [0, 1, 2, 7, 256])
@pytest.mark.parametrize("kind", ["none", "normal", "hostile"])
@pytest.mark.parametrize("page", [None, 16])
def test_splits_and_sinks(splits, kind, page, device):
    cache = Cache(device, 6, 1, 900, (24, 3), (64, 64), page)
    lengths = ints(device, 0, 1, 63, 64, 65, 900)
    options = {"num_splits": splits, "learnable_sink": make_sink(kind, 24, device)}
    result = cache.run(lengths, **options)
    truth = cache.truth(lengths, **options)
    if kind == "hostile":  # eager arithmetic does not know inf / inf and NaN of rows without keys
        truth[0][..., options["learnable_sink"].cpu() == INF, :] = 0.0
        truth[0][..., options["learnable_sink"].cpu().isnan(), :] = NAN
    check(result, truth)
    if kind == "normal":  # a row without keys: the sink to the bit
        assert torch.equal(result[1][0, :, 0], options["learnable_sink"])
        assert (result[0][0] == 0).all()


@pytest.mark.parametrize("group", [1, 2, 3, 5, 7, 8, 12, 16, 64])
@pytest.mark.parametrize("sq", [1, 2, 5, 16])
def test_groups_and_positions(group, sq, device):
    cache = Cache(device, 2, sq, 333, (2 * group, 2), (64, 64))
    lengths = ints(device, 333, max(sq - 1, 1))
    options = {"causal": True, "learnable_sink": make_sink("normal", 2 * group, device)}
    for splits in (0, 1, 3):
        check(cache.run(lengths, num_splits=splits, **options), cache.truth(lengths, **options))


@pytest.mark.parametrize(
    "dims",
    [
        *((8, 8), (40, 72), (64, 64), (64, 128), (80, 48), (96, 96), (104, 104), (128, 128)),
        *((160, 96), (192, 128), (192, 192), (248, 256), (256, 256)),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_head_dims(dims, dtype, device):
    for heads, sq in (((8, 1), 1), ((6, 2), 7)):
        cache = Cache(device, 2, sq, 400, heads, dims, dtype=dtype)
        lengths = ints(device, 400, 131)
        options = {"learnable_sink": make_sink("normal", heads[0], device)}
        for splits in (0, 1, 4):
            check(cache.run(lengths, num_splits=splits, **options), cache.truth(lengths, **options))


MASKS = [
    {"causal": True},
    {"causal": True, "window_size": (127, 0)},
    {"window_size": (40, 3)},
    {"window_size": (0, 0)},
    {"window_size": (-1, 5)},
    {"attention_chunk": 64},
    {"causal": True, "attention_chunk": 7},
    {"softcap": 15.0},
    {"causal": True, "softcap": 4.0, "window_size": (200, 0)},
    {"causal": True, "softmax_scale": 1.0},
]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("sq", [1, 4, 70])
def test_masks(mask, sq, device):
    cache = Cache(device, 3, sq, 700, (8, 2), (64, 64), page=16)
    lengths = ints(device, 700, 300, 33)
    options = mask | {"learnable_sink": make_sink("normal", 8, device)}
    for splits in (0, 1, 5):
        result = cache.run(lengths, num_splits=splits, **options)
        check(result, cache.truth(lengths, **options), rtol=2e-2)


@pytest.mark.parametrize("page", [1, 2, 3, 7, 8, 16, 48, 64, 256])
@pytest.mark.parametrize("dims", [(64, 64), (192, 128)])
def test_page_sizes(page, dims, device):
    """With one split the pages change nothing, to the bit."""
    cache = Cache(device, 4, 2, 512, (8, 2), dims, page)
    dense = Cache(device, 4, 2, 512, (8, 2), dims)
    dense.q, dense.k, dense.v = cache.q, cache.dense_k, cache.dense_v
    lengths = ints(device, 512, 100, 7, 0)
    pad = ints(device, 5, 99, 0, 0)
    options = {
        "causal": True,
        "cache_leftpad": pad,
        "learnable_sink": make_sink("normal", 8, device),
    }
    paged = cache.run(lengths, num_splits=1, **options)
    expected = dense.run(lengths, num_splits=1, **options)
    assert all(torch.equal(a, b) for a, b in zip(paged, expected, strict=True))
    check(paged, cache.truth(lengths, **options))
    check(cache.run(lengths, num_splits=0, **options), cache.truth(lengths, **options))


def test_rows_of_the_cache(device):
    """cache_batch_idx picks rows of a dense cache and of a page table; duplicates are fine."""
    for page in (None, 16):
        cache = Cache(device, 5, 1, 200, (8, 1), (128, 128), page)
        cache.q = cache.q[:3]
        rows = ints(device, 4, 0, 4)
        lengths = ints(device, 200, 17, 111)
        result = cache.run(lengths, cache_batch_idx=rows)
        truth = cache.truth(lengths, cache_batch_idx=rows)
        check(result, truth)


@pytest.mark.parametrize("splits", [0, 1, 3])
def test_packed_queries(splits, device):
    """Rows between, before and after the sequences are 0 and -inf; so are those past max_seqlen."""
    cache = Cache(device, 3, 4, 300, (16, 2), (64, 64), page=64)
    q = cache.q.flatten(0, 1)
    cu = ints(device, 1, 5, 5, 8)
    cache.q = q
    lengths = ints(device, 300, 10, 77)
    options = {"cu_seqlens_q": cu, "causal": True, "num_splits": splits}
    sink = make_sink("normal", 16, device)
    out, lse = cache.run(lengths, max_seqlen_q=4, learnable_sink=sink, **options)
    truth = cache.truth(lengths, q=q, cu_seqlens_q=cu, causal=True, learnable_sink=sink)
    check((out[1:8], lse[:, 1:8]), (truth[0][1:8], truth[1][:, 1:8]))
    for unused in ([0], [8, 9, 10, 11]):
        assert (out[unused] == 0).all()
        assert (lse[:, unused] == -INF).all()
    short, lse = cache.run(lengths, max_seqlen_q=2, learnable_sink=sink, **options)
    assert (short[[3, 4, 7]] == 0).all()
    assert (lse[:, [3, 4, 7]] == -INF).all()


@pytest.mark.parametrize("page", [None, 3, 64])
@pytest.mark.parametrize("splits", [0, 1, 3])
@pytest.mark.parametrize("garbage", [NAN, INF, 1e30])
def test_poison(page, splits, garbage, device):
    cache = Cache(device, 3, 2, 320, (8, 1), (64, 64), page)
    lengths, pad = ints(device, 70, 320, 0), ints(device, 9, 100, 0)
    sink = make_sink("normal", 8, device)
    options = {"num_splits": splits, "cache_leftpad": pad, "causal": True, "learnable_sink": sink}
    clean = cache.run(lengths, **options)
    slots = torch.arange(cache.k.shape[1] if page is None else 10**6, device=device)
    for pool in (cache.k, cache.v):
        if page is None:
            for b in range(3):
                unused = (slots >= lengths[b]) | (slots < pad[b])
                pool[b, unused] = garbage
        else:
            used = torch.zeros(pool.shape[:2], dtype=torch.bool, device=device)
            for b in range(3):
                for slot in range(int(pad[b]), int(lengths[b])):
                    used[cache.options["page_table"][b, slot // page], slot % page] = True
            pool[~used] = garbage
    if page is not None:
        table = cache.options["page_table"]
        table[0, -(-70 // page) :], table[2] = -1, 2**31 - 1
        table[1, : 100 // page] = -(2**31)
    poisoned = cache.run(lengths, **options)
    assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True))


@pytest.mark.parametrize("value", [-1, -(2**31), 2**31 - 1, 10**6])
@pytest.mark.parametrize("splits", [0, 1, 3])
def test_hostile_indices(value, splits, device):
    """Whatever the index tensors hold, nothing outside the cache is touched."""
    for page in (None, 1, 16):
        cache = Cache(device, 3, 2, 96, (8, 2), (64, 64), page)
        wild, fair = ints(device, value, 40, value), ints(device, 40, 96, 0)
        options = {"num_splits": splits, "causal": True}
        assert cache.run(wild, **options)[0].isfinite().all()
        for name in ("cache_batch_idx", "cache_leftpad"):
            assert cache.run(fair, **options, **{name: wild})[0].isfinite().all()
        if page:
            cache.options["page_table"] = torch.full_like(cache.options["page_table"], value)
            assert cache.run(fair, **options)[0].isfinite().all()
        cache.q = cache.q.flatten(0, 1)
        for cu in ((0, value, 4, 6), (value, 2, value, 6), (6, 4, 2, 0)):
            out, _ = cache.run(fair, cu_seqlens_q=ints(device, *cu), max_seqlen_q=6, **options)
            assert out.isfinite().all()


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)])
def test_batch_invariance(dims, device):
    """With one split a sequence's result does not depend on its neighbours or on sm_margin."""
    one = Cache(device, 1, 1, 700, (16, 2), dims, seed=1)
    expected = one.run(ints(device, 650), num_splits=1)
    for b in (2, 9, 64):
        many = Cache(device, b, 1, 700, (16, 2), dims, seed=b)
        for x, y in ((many.q, one.q), (many.k, one.k), (many.v, one.v)):
            x[b - 1] = y[0]
        lengths = torch.randint(0, 700, (b,), dtype=torch.int32).to(device)
        lengths[b - 1] = 650
        for margin in (0, 8):
            out, lse = many.run(lengths, num_splits=1, sm_margin=margin)
            assert torch.equal(out[b - 1], expected[0][0])
            assert torch.equal(lse[b - 1], expected[1][0])


@pytest.mark.parametrize("splits", [0, 1, 6])
def test_repeatable(splits, device):
    cache = Cache(device, 5, 1, 3000, (64, 8), (64, 64), page=16)
    lengths = ints(device, 3000, 1, 777, 2048, 0)
    first = cache.run(lengths, num_splits=splits)
    for _ in range(100 if device == "cuda" else 2):
        again = cache.run(lengths, num_splits=splits)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_metadata_is_read_only_and_of_fixed_size(device):
    cache = Cache(device, 3, 1, 2000, (64, 8), (64, 64))
    lengths = ints(device, 2000, 5, 600)
    for splits in (0, 1, 4):
        words = sinkattn.get_scheduler_metadata(3, 1, 2000, 64, 8, 64, lengths, num_splits=splits)
        assert words.dtype == torch.int32
        assert words.device.type == device
        assert words.numel() <= 4 * 4 + 1
        assert int(words[0]) == 3
        assert (words[1:4] >= 1).all()
        before = words.clone()
        expected = cache.run(lengths, num_splits=splits)
        # The same words for every layer, also once the lengths have moved on.
        for moved in (lengths, ints(device, 1999, 2000, 0)):
            result = cache.run(moved, num_splits=splits, scheduler_metadata=words)
            check(result, cache.truth(moved))
        assert torch.equal(words, before)
        result = cache.run(lengths, num_splits=splits, scheduler_metadata=words)
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    with pytest.raises(ValueError, match="scheduler_metadata"):
        cache.run(lengths, scheduler_metadata=words[:-1])


def test_many_sequences(device):
    """More sequences than a block has threads: the search for a block's part goes on."""
    b = 300
    cache = Cache(device, b, 1, 70, (8, 1), (64, 64), page=8)
    lengths = torch.arange(b, dtype=torch.int32).remainder(71).to(device)
    for splits in (0, 1):
        check(cache.run(lengths, num_splits=splits), cache.truth(lengths))
    uneven = Cache(device, b, 1, 5000, (8, 1), (64, 64)) if device == "cuda" else None
    if uneven is not None:
        lengths = (torch.arange(b) % 7 == 3).to(torch.int32).mul(4999).add(1).to(device)
        check(uneven.run(lengths), uneven.truth(lengths))


def test_long_query_chunk(device):
    """Chunked prefill against pages: many row tiles, each with its own end of the visible keys."""
    cache = Cache(device, 2, 300, 800, (8, 2), (64, 64), page=16)
    lengths = ints(device, 800, 310)
    options = {"causal": True, "learnable_sink": make_sink("normal", 8, device)}
    for splits in (0, 1, 2):
        check(cache.run(lengths, num_splits=splits, **options), cache.truth(lengths, **options))


def test_layouts(device):
    """Caches as (b, hk, s, d) in memory, and heads sliced from a wider tensor."""
    cache = Cache(device, 2, 1, 200, (8, 2), (64, 64))
    lengths = ints(device, 200, 50)
    expected = cache.run(lengths, num_splits=1)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (cache.k, cache.v))
    wide_k, wide_v = (torch.cat([x, x, x], dim=-1)[..., 64:128] for x in (cache.k, cache.v))
    for cache.k, cache.v in ((k, v), (wide_k, wide_v)):
        result = cache.run(lengths, num_splits=1)
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_nan_scores_reach_the_result(device):
    cache = Cache(device, 2, 1, 300, (8, 1), (64, 64))
    cache.k[0, 200, 0, 0] = NAN
    lengths = ints(device, 300, 300)
    for splits in (0, 1, 3):
        out, lse = cache.run(lengths, num_splits=splits)
        assert out[0].isnan().all()
        assert lse[0].isnan().all()
        assert out[1].isfinite().all()
        assert lse[1].isfinite().all()
        # Below the end of the window it is not seen.
        out, lse = cache.run(lengths, num_splits=splits, causal=True, window_size=(50, 0))
        assert out.isfinite().all()
        assert lse.isfinite().all()


def test_extreme_scores(device):
    """Scores of +-1e4 with a sink at 0: exp(sink - max) alone would overflow."""
    cache = Cache(device, 2, 1, 100, (4, 1), (64, 64))
    cache.k[0] = cache.q[0, 0, 0]
    cache.k[1] = -cache.q[1, 0, 0]
    lengths = ints(device, 100, 100)
    options = {"softmax_scale": 150.0, "learnable_sink": torch.zeros(4, device=device)}
    for splits in (0, 1, 2):
        check(cache.run(lengths, num_splits=splits, **options), cache.truth(lengths, **options))


def test_graph_with_lengths_and_pages_changed_in_place(device):
    if device != "cuda":
        pytest.skip("CUDA graphs")
    cache = Cache(device, 4, 1, 1024, (64, 8), (64, 64), page=16)
    lengths = ints(device, 5, 5, 5, 5)
    sink = make_sink("normal", 64, device)
    new = torch.randn(4, 1, 8, 64, device=device, dtype=torch.bfloat16)
    angle = torch.randn(1024, 32, device=device)
    rotary = {"rotary_cos": angle.cos().bfloat16(), "rotary_sin": angle.sin().bfloat16()}
    table = cache.options["page_table"]
    words = torch.zeros(5, dtype=torch.int32, device=device)

    def step():
        words.copy_(sinkattn.get_scheduler_metadata(4, 1, 1024, 64, 8, 64, lengths, page_size=16))
        appended = sinkattn.flash_attn_with_kvcache(
            cache.q, cache.k, cache.v, new, new, cache_seqlens=lengths, causal=True,
            page_table=table, learnable_sink=sink, scheduler_metadata=words, **rotary,
        )  # fmt: skip
        return appended, cache.run(lengths, causal=True, learnable_sink=sink)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for trial in range(20):
        g = torch.Generator().manual_seed(trial)
        lengths.copy_(torch.randint(0, 1023, (4,), generator=g, dtype=torch.int32))
        table.copy_(table.flatten()[torch.randperm(table.numel(), generator=g)].view_as(table))
        cache.k.normal_()
        graph.replay()
        replayed = [x.clone() for x in captured]
        eager = step()
        assert all(torch.equal(a, b) for a, b in zip(replayed, eager, strict=True))


def test_two_streams_share_metadata(device):
    if device != "cuda":
        pytest.skip("CUDA streams")
    caches = [Cache(device, 8, 1, 4000, (64, 8), (64, 64), page=64, seed=s) for s in range(2)]
    lengths = torch.randint(1, 4000, (8,), dtype=torch.int32).to(device)
    words = sinkattn.get_scheduler_metadata(8, 1, 4000, 64, 8, 64, lengths)
    expected = [cache.run(lengths, scheduler_metadata=words)[0] for cache in caches]
    streams = [torch.cuda.Stream() for _ in caches]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(caches[i].run(lengths, scheduler_metadata=words)[0])
    torch.cuda.synchronize()
    for i in range(2):
        assert all(torch.equal(result, expected[i]) for result in results[i])


def test_past_two_to_the_31(device):
    """Offsets of pages and of rows beyond 2^31 elements."""
    if device != "cuda":
        pytest.skip("10 GiB")
    pages = 70_000
    pool = torch.zeros(pages, 64, 8, 64, dtype=torch.bfloat16, device=device)
    small = Cache(device, 2, 1, 640, (64, 8), (64, 64), page=64)
    table = small.options["page_table"]
    shifted = (table + pages - small.k.shape[0]).to(torch.int32)
    lengths = ints(device, 640, 100)
    pool[-small.k.shape[0] :] = small.k
    expected = small.run(lengths, num_splits=1)
    result = sinkattn.flash_attn_with_kvcache(
        small.q, pool, pool, cache_seqlens=lengths, page_table=shifted, num_splits=1,
        return_softmax_lse=True,
    )  # fmt: skip
    small.v = small.k
    assert torch.equal(result[1], expected[1])
    assert torch.equal(result[0], small.run(lengths, num_splits=1)[0])
    rows = pool.view(2, -1, 8, 64)
    lengths = ints(device, 10, rows.shape[1])
    options = {"cache_seqlens": lengths, "causal": True, "window_size": (99, 0)}
    out = sinkattn.flash_attn_with_kvcache(small.q, rows, rows, **options)
    tail = rows[1:, -100:].contiguous()
    alone = sinkattn.flash_attn_with_kvcache(
        small.q[1:], tail, tail, cache_seqlens=ints(device, 100), causal=True
    )
    torch.testing.assert_close(out[1:], alone, rtol=1e-2, atol=1e-2)
    assert math.prod(pool.shape) > 2**31
