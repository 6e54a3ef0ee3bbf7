# SPDX-License-Identifier: Apache-2.0
"""Scores that grow along a row, from the last key to the first, which is the order of the forward
kernel: the reference of its exponentials has to follow, for these rows and for no other."""

from __future__ import annotations

import pytest
import sinkattn
import torch
from support import DTYPES, check, oracle_function, reference_function

ROWS, KEYS = 300, 900


def make(dims, dtype, growth):
    """Odd rows see scores that grow by `growth` towards key 0, even rows see none of it."""
    g = torch.Generator().manual_seed(7)
    d, dv = dims
    q = torch.randn(1, ROWS, 4, d, generator=g)
    k = torch.randn(1, KEYS, 2, d, generator=g)
    v = torch.randn(1, KEYS, 2, dv, generator=g)
    q[:, :, :, 0] = 4.0 * (torch.arange(ROWS) % 2)[None, :, None]
    rise = 1 - torch.arange(KEYS) / KEYS
    k[:, :, :, 0] = (growth * d**0.5 / 4 * rise)[None, :, None]
    return [x.to(DTYPES[dtype]) for x in (q, k, v)], torch.randn(4, generator=g)


def evaluate(function, tensors, sink, device="cpu", dtype=None):
    placed = [x.to(device) if dtype is None else x.to(device, dtype) for x in (*tensors, sink)]
    return dict(zip(("out", "lse"), function(*placed), strict=True))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (500, 100)}], ids=str)
@pytest.mark.parametrize("growth", [12.0, 60.0, 400.0])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "dims", [(64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)], ids=str
)
def test_growing_scores(dims, dtype, growth, options, device):
    if device == "cpu" and dims != (64, 64):
        pytest.skip("one head dim stands for all on CPU")
    tensors, sink = make(dims, dtype, growth)
    truth = evaluate(oracle_function(**options), tensors, sink, dtype=torch.float64)
    same = evaluate(reference_function(DTYPES[dtype], **options), tensors, sink)
    actual_dtype = torch.float32 if device == "cpu" else None
    result = evaluate(oracle_function(**options), tensors, sink, device, actual_dtype)
    check(result, truth, same, DTYPES[dtype])


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)], ids=str)
def test_rows_do_not_see_each_other(dims, device):
    """Rows whose reference moves, or that are NaN, leave the bits of their neighbours alone."""
    dtype = "bf16"
    (q, k, v), sink = make(dims, dtype, 60.0)
    kind = torch.float32 if device == "cpu" else DTYPES[dtype]
    q, k, v = (x.to(device, kind) for x in (q, k, v))
    sink = sink.to(device)

    def run(queries):
        return sinkattn.flash_attn_func(queries, k, v, learnable_sink=sink, return_attn_probs=True)

    out, lse = run(q)
    for value in (0.0, float("nan")):
        changed = q.clone()
        changed[:, 1::2] = value
        other_out, other_lse = run(changed)
        assert torch.equal(out[:, ::2], other_out[:, ::2])
        assert torch.equal(lse[:, :, ::2], other_lse[:, :, ::2])
        assert not other_out[:, ::2].isnan().any()
        if value != value:
            assert other_out[:, 1::2].isnan().all()
