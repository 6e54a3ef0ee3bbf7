# SPDX-License-Identifier: Apache-2.0
"""Caches, sinks and comparisons for the tests of attention against a KV cache."""

from __future__ import annotations

import sinkattn
import torch

NAN, INF = float("nan"), float("inf")


class Cache:
    """A dense or paged cache with random contents, and queries for it."""

    def __init__(self, device, b, sq, capacity, heads, dims, page=None, seed=0, dtype="bfloat16"):
        g = torch.Generator().manual_seed(seed)
        (h, hk), (d, dv) = heads, dims
        self.device, self.page = device, page
        dtype = getattr(torch, dtype)

        def normal(*shape):
            return torch.randn(*shape, generator=g).to(dtype).to(device)

        self.q = normal(b, sq, h, d)
        self.dense_k, self.dense_v = normal(b, capacity, hk, d), normal(b, capacity, hk, dv)
        self.k, self.v, self.options = self.dense_k, self.dense_v, {}
        if page:
            pages = -(-capacity // page)
            spare = 3
            order = torch.randperm(b * pages + spare, generator=g)[: b * pages]
            table = order.view(b, pages).to(torch.int32).to(device)
            self.k = normal(b * pages + spare, page, hk, d)
            self.v = normal(b * pages + spare, page, hk, dv)
            for pool, dense in ((self.k, self.dense_k), (self.v, self.dense_v)):
                padded = dense.new_zeros(b, pages * page, *dense.shape[2:])
                padded[:, :capacity] = dense
                pool[table.long().flatten()] = padded.view(b * pages, page, *dense.shape[2:])
            self.options = {"page_table": table}

    def run(self, lengths, **options):
        return sinkattn.flash_attn_with_kvcache(
            self.q, self.k, self.v, cache_seqlens=lengths, return_softmax_lse=True,
            **(self.options | options),
        )  # fmt: skip

    def truth(self, lengths, q=None, **options):
        options.pop("num_splits", None)
        return sinkattn.attention_reference(
            *(x.double().cpu() for x in (self.q if q is None else q, self.dense_k, self.dense_v)),
            seqused_k=lengths.cpu(),
            **{n: x.cpu() if isinstance(x, torch.Tensor) else x for n, x in options.items()},
        )


def ints(device, *values):
    return torch.tensor(values, dtype=torch.int32, device=device)


def check(result, truth, rtol=1e-2):
    """Per head: one head's sink must not touch another's. LSE in natural units."""
    out, lse = (x.double().cpu() for x in result)
    for actual, expected, heads, tolerance in (
        (out, truth[0].double().cpu(), -2, rtol),
        (lse, truth[1].double().cpu(), -2 if truth[1].dim() == 2 else 1, 3e-4),
    ):
        assert torch.equal(actual.isnan(), expected.isnan())
        assert torch.equal(actual.isinf(), expected.isinf())
        for head in range(expected.shape[heads]):
            a, e = actual.select(heads, head), expected.select(heads, head)
            finite = e.isfinite()
            if finite.any():
                error = float((a - e)[finite].abs().max())
                scale = max(1.0, float(e[finite].abs().max()))
                assert error <= tolerance * scale, f"head {head}: {error:.3e} of {scale:.3e}"


def make_sink(kind, heads, device):
    if kind == "none":
        return None
    if kind == "hostile":
        values = [0.0, INF, -INF, NAN, 3e38, -3e38, 1e4, -1e4, 88.0, -88.0, 1e-40, -0.0]
        return torch.tensor((values * heads)[:heads], device=device)
    return torch.randn(heads, generator=torch.Generator().manual_seed(5)).to(device)
