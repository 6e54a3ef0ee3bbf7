# SPDX-License-Identifier: Apache-2.0
"""The backward operator alone: out and LSE come from eager torch, so that nothing but the backward
is under test. Repeatability, partial gradients, unused rows, group splits, padded head dims."""

from __future__ import annotations

import pytest
import sinkattn
import torch
from support import check

DIMS = [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)]
NAMES = ("dq", "dk", "dv", "dsink")


class Problem:
    """A dense problem in bf16 with its fp64 truth and the same formula in bf16."""

    def __init__(self, device, batch, sq, sk, heads, dims, seed=0, **options):
        g = torch.Generator().manual_seed(seed)
        (h, hk), (d, dv) = heads, dims
        bf16 = torch.bfloat16
        self.device, self.options = device, options
        self.q = torch.randn(batch, sq, h, d, generator=g).to(bf16)
        self.k = torch.randn(batch, sk, hk, d, generator=g).to(bf16)
        self.v = torch.randn(batch, sk, hk, dv, generator=g).to(bf16)
        self.dout = torch.randn(batch, sq, h, dv, generator=g).to(bf16)
        self.dlse = torch.randn(batch, h, sq, generator=g)
        self.sink = torch.randn(h, generator=g)
        self.used_q = self.used_k = None

    def eager(self, dtype):
        """out, lse and the gradients by autograd of the reference."""
        leaves = [x.to(self.device, dtype).requires_grad_() for x in (self.q, self.k, self.v)]
        sink_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        leaves.append(self.sink.to(self.device, sink_dtype).requires_grad_())
        out, lse = sinkattn.attention_reference(
            *leaves[:3], learnable_sink=leaves[3], compute_dtype=dtype,
            seqused_q=self.used_q, seqused_k=self.used_k, **self.options,
        )  # fmt: skip
        dlse = self.dlse.to(lse)
        seeds = (self.dout.to(out), torch.where(lse.isinf(), torch.zeros_like(dlse), dlse))
        gradients = torch.autograd.grad((out, lse), leaves, seeds)
        return out.detach(), lse.detach(), dict(zip(NAMES, gradients, strict=True))

    def arguments(self, out, lse):
        place = [x.to(self.device) for x in (self.dout, self.dlse, self.q, self.k, self.v)]
        return [*place, out.to(self.device, torch.bfloat16), lse.to(self.device, torch.float32)]

    def run(self, arguments, deterministic=False, need_dq=True, need_dkv=True):
        options = dict(self.options)
        left, right = options.pop("window_size", (-1, -1))
        gradients = torch.ops.sinkattn.bwd(
            *arguments, None, None, self.used_q, self.used_k, None, None, None,
            options.pop("causal", False), left, right, options.pop("attention_chunk", 0),
            options.pop("softcap", 0.0), deterministic, 0, need_dq, need_dkv,
            self.sink.to(self.device),
        )  # fmt: skip
        assert not options
        return dict(zip(NAMES, gradients, strict=True))


def check_problem(problem, **flags):
    out, lse, truth = problem.eager(torch.float64)
    _, _, same = problem.eager(torch.bfloat16)
    result = problem.run(problem.arguments(out, lse), **flags)
    softcap = problem.options.get("softcap", 0.0)
    result = {name: x for name, x in result.items() if x.numel() or not truth[name].numel()}
    check(result, truth, same, torch.bfloat16, softcap)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"window_size": (50, 20)}, {"attention_chunk": 48}, {"softcap": 15.0}],
    ids=str,
)
def test_masks(options, dims, deterministic, device):
    problem = Problem(device, 1, 150, 200, (4, 2), dims, **options)
    if "softcap" in options:
        problem.q = (problem.q * 4).to(torch.bfloat16)
    check_problem(problem, deterministic=deterministic)


@pytest.mark.parametrize("heads", [(1, 1), (5, 1), (12, 4), (64, 8), (7, 7)], ids=str)
def test_groups(heads, device):
    """Few keys: on a GPU the query heads of a group are split over blocks."""
    check_problem(Problem(device, 1, 130, 140, heads, (64, 64), causal=True))


def test_group_in_one_block(device):
    """Enough keys for every multiprocessor: one block loops over the heads of a group."""
    if device == "cpu":
        pytest.skip("the CPU backend has no blocks")
    check_problem(Problem(device, 32, 130, 260, (8, 4), (64, 64), causal=True))


@pytest.mark.parametrize("dims", [(8, 8), (40, 72), (80, 48), (104, 120), (136, 64), (64, 256)])
def test_padded_head_dims(dims, device):
    check_problem(Problem(device, 1, 70, 133, (2, 1), dims, causal=True))


@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_partial_gradients(dims, device):
    """What is asked for alone has the bits of the full call."""
    problem = Problem(device, 2, 150, 300, (4, 2), dims, causal=True)
    out, lse, _ = problem.eager(torch.float64)
    arguments = problem.arguments(out, lse)
    full = problem.run(arguments, deterministic=True)
    only_dq = problem.run(arguments, deterministic=True, need_dkv=False)
    only_dkv = problem.run(arguments, deterministic=True, need_dq=False)
    assert only_dq["dk"].numel() == only_dq["dv"].numel() == only_dkv["dq"].numel() == 0
    for name, result in (("dq", only_dq), ("dk", only_dkv), ("dv", only_dkv)):
        assert torch.equal(result[name], full[name]), name
        assert torch.equal(result["dsink"], full["dsink"])


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_repeatable(dims, deterministic, device):
    """Deterministic: everything. Otherwise dk, dv and dsink, which have one writer anyway."""
    problem = Problem(device, 2, 300, 400, (4, 2), dims, window_size=(250, 0))
    out, lse, _ = problem.eager(torch.float64)
    arguments = problem.arguments(out, lse)
    first = problem.run(arguments, deterministic)
    for _ in range(20 if device == "cuda" else 2):
        for name, value in problem.run(arguments, deterministic).items():
            if name != "dq" or deterministic:
                assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("deterministic", [False, True])
def test_unused_rows(deterministic, device):
    """NaN beyond the used lengths has no influence; gradient rows there are exactly 0."""
    problem = Problem(device, 3, 150, 200, (4, 2), (64, 64), causal=True)
    used_q, used_k = [150, 0, 70], [200, 33, 130]
    problem.used_q = torch.tensor(used_q, dtype=torch.int32, device=device)
    problem.used_k = torch.tensor(used_k, dtype=torch.int32, device=device)
    out, lse, _ = problem.eager(torch.float64)
    clean = problem.run(problem.arguments(out, lse), True)
    for b in range(3):
        for x in (problem.q, problem.dout, out):
            x[b, used_q[b] :] = float("nan")
        for x in (problem.k, problem.v):
            x[b, used_k[b] :] = float("nan")
        for x in (problem.dlse, lse):
            x[b, :, used_q[b] :] = float("nan")
    result = problem.run(problem.arguments(out, lse), deterministic)
    for name, value in result.items():
        if deterministic or name == "dsink":
            assert torch.equal(value, clean[name]), name
        else:
            torch.testing.assert_close(value, clean[name], rtol=2e-2, atol=2e-2)
    for b in range(3):
        assert (result["dq"][b, used_q[b] :] == 0).all()
        assert (result["dk"][b, used_k[b] :] == 0).all()
        assert (result["dv"][b, used_k[b] :] == 0).all()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_no_tokens(shape, device):
    sq, sk = shape
    problem = Problem(device, 2, sq, sk, (4, 2), (64, 64))
    out, lse, truth = problem.eager(torch.float64)
    result = problem.run(problem.arguments(out, lse))
    for name in ("dq", "dk", "dv"):
        assert (result[name] == 0).all(), name
    torch.testing.assert_close(result["dsink"].double(), truth["dsink"].double())
