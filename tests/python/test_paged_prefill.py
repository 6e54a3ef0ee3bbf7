# SPDX-License-Identifier: Apache-2.0
"""Many queries against a paged cache: chunks of a prompt whose context lies in pages."""

from __future__ import annotations

import pytest
import sinkattn
import torch
from caches import INF, NAN, Cache, check, ints, make_sink

# Pages of 8 slots and more are copied whole or in equal boxes by the kernel of dense calls on
# CUDA, the others by the decode kernel: the same results are asked of both.
PAGES = [1, 7, 8, 16, 24, 48, 64, 128, 256]
PAIRS = [(64, 64), (40, 24), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)]
MASKS = [
    {"causal": True},
    {},
    {"causal": True, "window_size": (127, 0)},
    {"window_size": (30, 10)},
    {"attention_chunk": 96},
    {"causal": True, "softcap": 15.0},
]
CHUNK = 210  # more rows than one tile, and no multiple of anything


def sink_of(device):
    return make_sink("normal", 4, device)


def twin(cache):
    """The same tokens in a dense cache."""
    dense = Cache.__new__(Cache)
    dense.__dict__.update(cache.__dict__, k=cache.dense_k, v=cache.dense_v, page=None, options={})
    return dense


@pytest.mark.parametrize("page", PAGES)
def test_page_sizes(page, device):
    cache = Cache(device, 3, CHUNK, 600, (4, 2), (64, 64), page)
    lengths = ints(device, 600, 333, 64)
    for mask in MASKS[:3]:
        options = mask | {"learnable_sink": sink_of(device)}
        truth = cache.truth(lengths, **options)
        for splits in (1, 3):
            check(cache.run(lengths, num_splits=splits, **options), truth)


@pytest.mark.parametrize("dims", PAIRS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_head_dims(dims, dtype, device):
    cache = Cache(device, 2, CHUNK, 500, (4, 1), dims, 16, dtype=dtype)
    lengths = ints(device, 500, 211)
    for mask in (MASKS[0], MASKS[2]):
        options = mask | {"learnable_sink": sink_of(device)}
        check(cache.run(lengths, **options), cache.truth(lengths, **options))


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("page", [16, 128])
def test_masks(mask, page, device):
    cache = Cache(device, 4, CHUNK, 700, (4, 2), (64, 64), page)
    lengths = ints(device, 700, 450, 100, 0)
    options = mask | {"learnable_sink": sink_of(device)}
    check(cache.run(lengths, **options), cache.truth(lengths, **options), rtol=2e-2)


@pytest.mark.parametrize("dims", [(64, 64), (192, 128)])
@pytest.mark.parametrize("page", [8, 64, 256])
def test_pages_change_nothing(dims, page, device):
    """Where the dense call runs with the same tile of keys: equal up to rounding."""
    cache = Cache(device, 2, CHUNK, 5120, (4, 2), dims, page)
    lengths = ints(device, 5100, 1000)
    for mask in MASKS[:3]:
        options = mask | {"learnable_sink": sink_of(device), "num_splits": 1}
        paged, dense = cache.run(lengths, **options), twin(cache).run(lengths, **options)
        torch.testing.assert_close(paged[0], dense[0], rtol=2**-7, atol=2e-3)
        torch.testing.assert_close(paged[1], dense[1], rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("page", [1, 16, 64, 128])
@pytest.mark.parametrize("garbage", [NAN, INF, 1e30])
@pytest.mark.parametrize("mask", [MASKS[0], MASKS[2]], ids=str)
def test_poison(page, garbage, mask, device):
    """Slots behind a sequence, pages of nobody and pages left of every window hold anything, and
    their entries of the table are no pages at all."""
    cache = Cache(device, 3, CHUNK, 640, (4, 2), (64, 64), page)
    lengths = ints(device, 637, 300, 211)
    options = mask | {"learnable_sink": sink_of(device)}
    clean = {n: cache.run(lengths, num_splits=n, **options) for n in (1, 3)}
    table = cache.options["page_table"]
    left = mask.get("window_size", (10**6, 0))[0]
    used = torch.zeros(cache.k.shape[:2], dtype=torch.bool, device=device)
    for b in range(3):
        begin, end = max(0, int(lengths[b]) - CHUNK - left), int(lengths[b])
        for slot in range(begin, end):
            used[table[b, slot // page], slot % page] = True
        table[b, : begin // page] = -(2**31)
        table[b, -(-end // page) :] = 2**31 - 1
    for pool in (cache.k, cache.v):
        pool[~used] = garbage
    for n, expected in clean.items():
        poisoned = cache.run(lengths, num_splits=n, **options)
        assert all(torch.equal(a, b) for a, b in zip(expected, poisoned, strict=True))


@pytest.mark.parametrize("value", [-1, -(2**31), 2**31 - 1, 10**6])
@pytest.mark.parametrize("page", [1, 16, 128])
def test_hostile_indices(value, page, device):
    """Whatever the index tensors hold, nothing outside the cache is touched."""
    cache = Cache(device, 3, CHUNK, 384, (4, 2), (64, 64), page)
    wild, fair = ints(device, value, 240, value), ints(device, 240, 384, 0)
    for splits in (1, 3):
        options = {"num_splits": splits, "causal": True}
        assert cache.run(wild, **options)[0].isfinite().all()
        assert cache.run(fair, cache_batch_idx=wild, **options)[0].isfinite().all()
        table = cache.options["page_table"]
        hostile = {"page_table": torch.full_like(table, value)}
        assert cache.run(fair, **(options | hostile))[0].isfinite().all()
    cache.q = cache.q.flatten(0, 1)
    for cu in ((0, value, 400, 630), (value, 2, value, 630), (630, 400, 2, 0)):
        out, _ = cache.run(fair, cu_seqlens_q=ints(device, *cu), max_seqlen_q=630, causal=True)
        assert out.isfinite().all()


@pytest.mark.parametrize("page", [3, 16, 64])
def test_packed_chunks(page, device):
    """Chunks of different lengths in one call, through both functions that take a page table."""
    cache = Cache(device, 4, 0, 512, (4, 2), (64, 64), page)
    cu = ints(device, 0, 200, 201, 201, 520)
    g = torch.Generator().manual_seed(1)
    q = torch.randn(520, 4, 64, generator=g).to(torch.bfloat16).to(device)
    lengths = ints(device, 512, 30, 77, 400)
    sink = sink_of(device)
    options = {"causal": True, "learnable_sink": sink}
    truth = cache.truth(lengths, q=q, cu_seqlens_q=cu, **options)
    cache.q = q
    check(cache.run(lengths, cu_seqlens_q=cu, max_seqlen_q=319, **options), truth)
    result = sinkattn.flash_attn_varlen_func(
        q, cache.k, cache.v, cu, None, 319, 512, seqused_k=lengths, return_attn_probs=True,
        **options, **cache.options,
    )  # fmt: skip
    check(result, truth)


def test_rows_of_the_page_table(device):
    cache = Cache(device, 5, CHUNK, 300, (4, 2), (64, 64), 16)
    cache.q = cache.q[:3]
    options = {"cache_batch_idx": ints(device, 4, 0, 4), "causal": True}
    lengths = ints(device, 300, 215, 211)
    check(cache.run(lengths, **options), cache.truth(lengths, **options))


def test_chunk_is_appended_first(device):
    """A prompt in three chunks, each appended with its call, is the prompt at once."""
    page, prompt = 64, 3 * CHUNK
    cache = Cache(device, 2, CHUNK, 704, (4, 2), (64, 64), page)
    q, k, v = (
        torch.randn(2, prompt, h, 64, generator=torch.Generator().manual_seed(h))
        .to(torch.bfloat16)
        .to(device)
        for h in (4, 2, 2)
    )
    sink = sink_of(device)
    whole = sinkattn.flash_attn_func(q, k, v, causal=True, learnable_sink=sink)
    parts = []
    for chunk in range(3):
        at = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
        parts.append(
            sinkattn.flash_attn_with_kvcache(
                q[:, at],
                cache.k,
                cache.v,
                k[:, at],
                v[:, at],
                cache_seqlens=chunk * CHUNK,
                causal=True,
                learnable_sink=sink,
                **cache.options,
            )
        )
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=2e-2, atol=2e-2)


def test_repeatable(device):
    cache = Cache(device, 3, CHUNK, 900, (8, 2), (64, 64), 16)
    lengths = ints(device, 900, 211, 640)
    first = cache.run(lengths, causal=True)
    for _ in range(50 if device == "cuda" else 2):
        again = cache.run(lengths, causal=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
