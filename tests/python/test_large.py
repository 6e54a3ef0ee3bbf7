# SPDX-License-Identifier: Apache-2.0
"""Tensors of more than 2^31 elements: no 32-bit offset anywhere. On a GPU, in the full tier.

Whole results are too large to compute twice, so rows, heads and keys are sampled on both sides of
element 2^31, where a wrapped offset would show, and compared with the formulas in float64. What is
sampled carries weight: the keys beyond 2^31 get most of the attention."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import sinkattn
import torch
from sinkattn._info import unavailable_reason

LIMIT = 2**31


@pytest.fixture
def cuda(request):
    if request.config.getoption("--device") == "cpu":
        pytest.skip("needs a GPU's memory; --device cpu was asked for")
    reason = unavailable_reason()
    if reason is not None:
        pytest.skip(f"no Hopper GPU: {reason}")
    torch.cuda.empty_cache()
    yield "cuda"
    torch.cuda.empty_cache()


def require_memory(gib: float) -> None:
    """A GPU without room is a visible skip, never a pass."""
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free:.0f} are free")


def normal(*shape, seed=0, dtype=torch.bfloat16):
    g = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", dtype=dtype, generator=g)


@dataclass
class Formulas:
    """One sequence (batch index 0), causal with an optional left window, row by row in float64."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    sink: torch.Tensor
    dout: torch.Tensor
    dlse: torch.Tensor
    left: int = -1

    def __post_init__(self):
        self.sq, self.heads, d = self.q.shape[1:]
        self.sk, self.heads_kv = self.k.shape[1:3]
        self.scale = d**-0.5
        self.group = self.heads // self.heads_kv

    def row(self, i: int, h: int, out: torch.Tensor) -> dict[str, torch.Tensor]:
        """out, lse and dq of query row i of head h. `out`: the row as stored, from whose rounded
        values every backward takes its D; where a row sees few keys that is not a small matter."""
        position = i + self.sk - self.sq
        keys = slice(max(0, position - self.left) if self.left >= 0 else 0, position + 1)
        k = self.k[0, keys, h // self.group].double()
        v = self.v[0, keys, h // self.group].double()
        scores = self.scale * (k @ self.q[0, i, h].double())
        lse = torch.logsumexp(torch.cat([scores, self.sink[h : h + 1].double()]), 0)
        p = torch.exp(scores - lse)
        dout = self.dout[0, i, h].double()
        ds = p * (v @ dout - (dout @ out.double() - self.dlse[0, h, i].double()))
        return {"out": p @ v, "lse": lse, "dq": self.scale * (ds @ k)}

    def key(self, j: int, kv_head: int, out, lse) -> dict[str, torch.Tensor]:
        """dk and dv of key j, from the out and lse that were checked row by row."""
        first = j - (self.sk - self.sq)
        begin = max(0, first)
        end = min(self.sq, first + self.left + 1) if self.left >= 0 else self.sq
        heads = slice(kv_head * self.group, (kv_head + 1) * self.group)
        q, o, do = (x[0, begin:end, heads].double() for x in (self.q, out, self.dout))
        k, v = self.k[0, j, kv_head].double(), self.v[0, j, kv_head].double()
        p = torch.exp(self.scale * (q @ k) - lse[0, heads, begin:end].double().T)
        d = (do * o).sum(-1) - self.dlse[0, heads, begin:end].double().T
        ds = p * (do @ v - d)
        return {
            "dk": self.scale * torch.einsum("ih,ihd->d", ds, q),
            "dv": torch.einsum("ih,ihd->d", p, do),
        }


def close(actual, expected, what: str, rtol=3e-2):
    """Against the largest magnitude; a row read from the wrong place is off by all of it."""
    error = float((actual.double() - expected).abs().max())
    limit = rtol * max(float(expected.abs().max()), 1e-2)
    assert error <= limit, f"{what}: {error:.3e} > {limit:.3e}"


def check(problem: Formulas, rows, keys) -> None:
    leaves = [x.requires_grad_() for x in (problem.q, problem.k, problem.v, problem.sink)]
    out, lse = sinkattn.flash_attn_func(
        *leaves[:3], causal=True, window_size=(problem.left, 0), return_attn_probs=True,
        learnable_sink=leaves[3],
    )  # fmt: skip
    gradients = torch.autograd.grad((out, lse), leaves, (problem.dout, problem.dlse))
    dq, dk, dv, dsink = gradients
    with torch.no_grad():
        for i, h in rows:
            truth = problem.row(i, h, out[0, i, h])
            place = f"row {i} head {h}"
            close(out[0, i, h], truth["out"], f"out, {place}")
            close(lse[0, h, i], truth["lse"], f"lse, {place}", rtol=1e-4)
            close(dq[0, i, h], truth["dq"], f"dq, {place}")
        for j, kv_head in keys:
            truth = problem.key(j, kv_head, out, lse)
            place = f"key {j} head {kv_head}"
            close(dk[0, j, kv_head], truth["dk"], f"dk, {place}")
            close(dv[0, j, kv_head], truth["dv"], f"dv, {place}")
        truth = torch.zeros_like(dsink, dtype=torch.float64)
        for begin in range(0, problem.sq, 4096):
            part = slice(begin, begin + 4096)
            d = (problem.dout[0, part].double() * out[0, part].double()).sum(-1).T
            d -= problem.dlse[0, :, part].double()
            truth -= (torch.exp(problem.sink.double()[:, None] - lse[0, :, part].double()) * d).sum(
                1
            )
        close(dsink, truth, "dsink", rtol=1e-3)


@pytest.mark.full
def test_more_than_2_31_elements_of_keys(cuda):
    require_memory(45)
    h, hk, d, sq = 16, 8, 128, 128
    border = LIMIT // (hk * d)  # the first key whose elements lie beyond 2^31
    sk = border + 1000
    q, k, v = normal(1, sq, h, d), normal(1, sk, hk, d, seed=1), normal(1, sk, hk, d, seed=2)
    q[..., 0] = 16.0
    k[:, border:, :, 0] = 16.0  # scores larger by 22: e^22 outweighs two million keys
    dout, dlse = normal(1, sq, h, d, seed=3), normal(1, h, sq, seed=4, dtype=torch.float32)
    problem = Formulas(q, k, v, normal(h, dtype=torch.float32), dout, dlse)
    rows = [(i, head) for i in (0, 1, 63, 127) for head in (0, 7, 15)]
    keys = [(j, head) for j in (0, border - 1, border, border + 1, sk - 1) for head in (0, hk - 1)]
    check(problem, rows, keys)


@pytest.mark.full
def test_more_than_2_31_elements_of_queries(cuda):
    require_memory(45)
    h, hk, d = 64, 8, 128
    border = LIMIT // (h * d)
    s = border + 500
    q, dout = normal(1, s, h, d), normal(1, s, h, d, seed=3)
    k, v = normal(1, s, hk, d, seed=1), normal(1, s, hk, d, seed=2)
    dlse = normal(1, h, s, seed=4, dtype=torch.float32)
    problem = Formulas(q, k, v, normal(h, dtype=torch.float32), dout, dlse, left=127)
    places = (0, 127, border - 1, border, border + 1, s - 129, s - 1)
    check(
        problem,
        [(i, head) for i in places for head in (0, 33, h - 1)],
        [(j, head) for j in places for head in (0, hk - 1)],
    )


@pytest.mark.full
def test_more_than_2_31_rows(cuda):
    """b * h * sq > 2^31 with d 8: LSE offsets. All batch entries are the same memory, so the
    results must be the same bits, wherever they are written."""
    require_memory(75)  # an expanded q is copied: 32 GiB, like the output; 8 GiB of LSE
    b, s, h, d = 2048, 16400, 64, 8
    assert b * s * h > LIMIT
    q, k, v = normal(1, s, h, d), normal(1, s, 1, d, seed=1), normal(1, s, 1, d, seed=2)
    options = {
        "causal": True, "window_size": (15, 0), "return_attn_probs": True,
        "learnable_sink": normal(h, dtype=torch.float32),
    }  # fmt: skip
    one_out, one_lse = sinkattn.flash_attn_func(q, k, v, **options)
    wide = [x.expand(b, -1, -1, -1) for x in (q, k, v)]
    out, lse = sinkattn.flash_attn_func(*wide, **options)
    for i in (0, 1, b // 2 - 1, b // 2, b - 2, b - 1):
        assert torch.equal(out[i], one_out[0]), f"out of batch entry {i}"
        assert torch.equal(lse[i], one_lse[0]), f"lse of batch entry {i}"


@pytest.mark.full
def test_pages_beyond_2_32_elements(cuda):
    """page * stride > 2^32; all pages that are not in the table hold NaN."""
    require_memory(25)
    page_size, hk, d = 256, 8, 128
    pages = 2**32 // (page_size * hk * d) + 8
    shape = (pages, page_size, hk, d)
    k, v = (torch.full(shape, float("nan"), device="cuda", dtype=torch.bfloat16) for _ in "kv")
    half = pages // 2
    table = torch.tensor([[0, pages - 1, half - 4, half, pages - 8]], dtype=torch.int32).cuda()
    dense_k, dense_v = (normal(1, 5 * page_size, hk, d, seed=i) for i in (1, 2))
    for cache, dense in ((k, dense_k), (v, dense_v)):
        cache[table[0].long()] = dense.view(5, page_size, hk, d)
    q = normal(1, 4, 64, d)
    options = {
        "cache_seqlens": torch.tensor([5 * page_size - 3], dtype=torch.int32).cuda(),
        "causal": True, "num_splits": 1, "return_softmax_lse": True,
        "learnable_sink": normal(64, dtype=torch.float32),
    }  # fmt: skip
    out, lse = sinkattn.flash_attn_with_kvcache(q, k, v, page_table=table, **options)
    expected, lse_expected = sinkattn.flash_attn_with_kvcache(q, dense_k, dense_v, **options)
    close(out, expected.double(), "out", rtol=1e-2)
    close(lse, lse_expected.double(), "lse", rtol=1e-4)


@pytest.mark.full
def test_prepare_beyond_2_31_elements(cuda):
    require_memory(12)
    h, dv = 64, 128
    border = LIMIT // (h * dv)
    s = border + 500
    out, dout = normal(1, s, h, dv), normal(1, s, h, dv, seed=1)
    lse, dlse = (normal(1, h, s, seed=i, dtype=torch.float32) for i in (2, 3))
    sink = normal(h, seed=4, dtype=torch.float32)
    nothing, key = out.new_empty(0), out.new_zeros(1, 1, 1, dv)
    d, dsink = torch.ops.sinkattn.bwd_out(
        nothing, nothing, nothing, dout, dlse, out, key, key, out, lse,
        need_dq=False, need_dkv=False, learnable_sink=sink,
    )  # fmt: skip
    truth = torch.zeros(h, device="cuda", dtype=torch.float64)
    for begin in range(0, s, 4096):
        part = slice(begin, min(s, begin + 4096))
        expected = (dout[0, part].double() * out[0, part].double()).sum(-1).T
        expected -= dlse[0, :, part].double()
        close(d[0, :, part], expected, f"D' of rows from {begin}", rtol=1e-5)
        weight = torch.exp(sink.double()[:, None] - lse[0, :, part].double())
        truth -= (weight * expected).sum(1)
    close(dsink, truth, "dsink", rtol=1e-3)


@pytest.mark.full
def test_combine_beyond_2_31_elements(cuda):
    require_memory(20)
    n, h, dv = 2, 64, 128
    s = LIMIT // (n * h * dv) + 500
    out_partial = normal(n, 1, s, h, dv, dtype=torch.float32)
    lse_partial = 3 * normal(n, 1, s, h, seed=1, dtype=torch.float32)
    sink = normal(h, seed=2, dtype=torch.float32)
    out, lse = sinkattn.flash_attn_combine(
        out_partial, lse_partial, out_dtype=torch.bfloat16, learnable_sink=sink
    )
    for i in (0, 1, s // 2, s - 501, s - 500, s - 1):
        parts = lse_partial[:, 0, i].double()
        total = torch.logsumexp(torch.cat([parts, sink.double()[None]]), 0)
        weight = torch.exp(parts - total)[..., None]
        close(out[0, i], (weight * out_partial[:, 0, i].double()).sum(0), f"out, row {i}", 1e-2)
        close(lse[0, i] if lse.shape[1] == s else lse[0, :, i], total, f"lse, row {i}", 1e-5)


def test_the_formulas_themselves():
    """The sampled formulas against autograd, so that the checks above rest on something."""
    g = torch.Generator().manual_seed(0)
    shapes = [(1, 9, 4, 8), (1, 12, 2, 8), (1, 12, 2, 8), (4,), (1, 9, 4, 8), (1, 4, 9)]
    q, k, v, sink, dout, dlse = (torch.randn(s, generator=g).double() for s in shapes)
    for left in (-1, 3):
        problem = Formulas(q, k, v, sink, dout, dlse, left=left)
        leaves = [x.clone().requires_grad_() for x in (q, k, v, sink)]
        out, lse = sinkattn.attention_reference(
            *leaves[:3], causal=True, window_size=(left, 0), learnable_sink=leaves[3]
        )
        dq, dk, dv, _ = torch.autograd.grad((out, lse), leaves, (dout, dlse))
        for i, h in ((0, 0), (4, 3), (8, 2)):
            truth = problem.row(i, h, out.detach()[0, i, h])
            for name, x in (("out", out[0, i, h]), ("lse", lse[0, h, i]), ("dq", dq[0, i, h])):
                torch.testing.assert_close(x.detach(), truth[name], rtol=1e-10, atol=1e-12)
        for j, kv_head in ((0, 0), (3, 1), (11, 1)):
            truth = problem.key(j, kv_head, out.detach(), lse.detach())
            torch.testing.assert_close(dk[0, j, kv_head], truth["dk"], rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(dv[0, j, kv_head], truth["dv"], rtol=1e-10, atol=1e-12)
