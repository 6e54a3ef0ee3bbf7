# SPDX-License-Identifier: Apache-2.0
"""Dense forward and backward against the float64 oracle, and the oracle against eager torch."""

from __future__ import annotations

import pytest
import sinkattn
import torch
from support import (
    DTYPES,
    Case,
    check,
    close,
    make_inputs,
    oracle_function,
    pairwise,
    reference_function,
    run,
)

LENGTHS = [(1, 1), (64, 128), (113, 203), (239, 1), (128, 217), (65, 65), (257, 63), (108, 256)]
LENGTHS += [(2, 128), (129, 1000), (384, 256), (1, 1000), (63, 64)]
HEADS = [(6, 6), (6, 2), (6, 1), (5, 1), (7, 7), (12, 4), (64, 8), (40, 8), (96, 8)]
DIMS = [(64, 64), (128, 128), (96, 96), (192, 128), (256, 256), (8, 8), (72, 104), (80, 48)]
MASKS = [
    (),
    (("causal", True),),
    (("causal", True), ("window_size", (127, 0))),
    (("window_size", (17, 33)),),
    (("window_size", (0, 0)),),
    (("window_size", (30, -1)),),
    (("window_size", (-1, 9)),),
    (("attention_chunk", 7),),
    (("attention_chunk", 64), ("causal", True)),
    (("attention_chunk", 1000),),
    (("window_size", (5, 0)), ("attention_chunk", 64)),
]
SINKS = ["none", "fp32", "bf16", "fp16", "x4", "mixed"]


def own_dtype(device):
    """The most exact dtype that a device serves."""
    return "fp32" if device == "cpu" else "bf16"


def leaves(inputs):
    return inputs.q, inputs.k, inputs.v, inputs.sink


def cases(dtypes, seed):
    rows = pairwise(
        {
            "length": LENGTHS,
            "heads": HEADS,
            "dims": DIMS,
            "mask": MASKS,
            "sink": SINKS,
            "dtype": dtypes,
            "softcap": [0.0, 15.0],
            "scale": [None, 0.03, 1.0],
        },
        seed,
    )
    result = []
    for row in rows:
        options = row["mask"]
        if row["softcap"]:
            options += (("softcap", row["softcap"]),)
        if row["scale"]:
            options += (("softmax_scale", row["scale"]),)
        sq, sk = row["length"]
        batch = 1 if sq * sk * row["heads"][0] > 10**6 else 2
        result.append(
            Case(batch, sq, sk, row["heads"], row["dims"], row["dtype"], options, row["sink"])
        )
    return result


@pytest.mark.parametrize("case", cases(list(DTYPES), seed=1), ids=str)
def test_against_oracle(case, device):
    dtype = DTYPES[case.dtype]
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("fp32 is a CPU dtype")
    inputs = make_inputs(case)
    softcap = case.kwargs.get("softcap", 0.0)
    truth = run(oracle_function(**case.kwargs), inputs, torch.float64)
    result = run(oracle_function(**case.kwargs), inputs, device=device)
    if dtype == torch.float32:
        close(result, truth, rtol=2e-5 if case.kwargs.get("softmax_scale") == 1.0 else 1e-5)
        return
    same = run(reference_function(dtype, **case.kwargs), inputs)
    check(result, truth, same, dtype, softcap)


@pytest.mark.parametrize("case", cases(["fp64"], seed=2)[:60], ids=str)
def test_oracle_against_eager(case):
    """Two independent implementations in float64: C++ loops and eager torch."""
    inputs = make_inputs(case)
    oracle = run(oracle_function(**case.kwargs), inputs, torch.float64)
    eager = run(reference_function(torch.float64, **case.kwargs), inputs, torch.float64)
    close(oracle, eager, rtol=1e-12 if not case.kwargs.get("softcap") else 1e-11)


@pytest.mark.parametrize(
    "length", [(512, 512), (1023, 1024), (1024, 1023)], ids=lambda x: f"{x[0]}x{x[1]}"
)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_long(length, dtype, device):
    if device == "cuda" and dtype == "fp32":
        pytest.skip("fp32 is a CPU dtype")
    options = (("causal", True), ("window_size", (300, 0)))
    case = Case(1, *length, (8, 1), (64, 64), dtype, options, "fp32")
    inputs = make_inputs(case)
    truth = run(oracle_function(**case.kwargs), inputs, torch.float64)
    result = run(oracle_function(**case.kwargs), inputs, device=device)
    if dtype == "fp32":
        close(result, truth, rtol=1e-5)
    else:
        same = run(reference_function(torch.bfloat16, **case.kwargs), inputs)
        check(result, truth, same, torch.bfloat16)


@pytest.mark.parametrize("num_splits", [0, 2, 3, 17, 256])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (40, 3)}], ids=str)
def test_splits(num_splits, options, device):
    """The sink counts once, also where the first splits are empty."""
    case = Case(2, 70, 400, (8, 2), (64, 64), own_dtype(device), tuple(options.items()), "fp32")
    inputs = make_inputs(case)

    def evaluate(function, dtype=None, device="cpu"):
        x = [t.to(device) if dtype is None else t.to(device, dtype) for t in leaves(inputs)]
        return dict(zip(("out", "lse"), function(*x), strict=True))

    truth = evaluate(oracle_function(**options), torch.float64)
    result = evaluate(oracle_function(num_splits=num_splits, **options), device=device)
    if device == "cpu":
        close(result, truth, rtol=1e-5)
    else:
        same = evaluate(reference_function(torch.bfloat16, **options))
        check(result, truth, same, torch.bfloat16)


@pytest.mark.parametrize("group", [1, 2, 3, 5, 7, 8, 12, 16, 64, 130])
@pytest.mark.parametrize("pack_gqa", [None, False, True])
def test_groups(group, pack_gqa, device):
    """Sinks far apart: a swapped head index cannot pass."""
    case = Case(1, 37, 65, (2 * group, 2), (32, 32), own_dtype(device), (("causal", True),))
    inputs = make_inputs(case)
    inputs.sink = torch.linspace(-6, 6, 2 * group)
    truth = run(oracle_function(causal=True), inputs, torch.float64)
    result = run(oracle_function(causal=True, pack_gqa=pack_gqa), inputs, device=device)
    if device == "cpu":
        close(result, truth, rtol=1e-5)
    else:
        same = run(reference_function(torch.bfloat16, causal=True), inputs)
        check(result, truth, same, torch.bfloat16)


@pytest.mark.parametrize("wanted", range(1, 16))
def test_partial_gradients(wanted, device):
    """Every subset of {q, k, v, sink}: what is asked for has the bits of the full call."""
    case = Case(2, 50, 60, (6, 2), (64, 64), "bf16", (("causal", True),))
    inputs = make_inputs(case)
    full = run(
        lambda q, k, v, s: sinkattn.flash_attn_func(
            q, k, v, causal=True, deterministic=True, return_attn_probs=True, learnable_sink=s
        ),
        inputs,
        device=device,
    )
    leaves = [x.to(device) for x in (inputs.q, inputs.k, inputs.v, inputs.sink)]
    leaves = [x.requires_grad_(bool(wanted >> i & 1)) for i, x in enumerate(leaves)]
    out, lse = sinkattn.flash_attn_func(
        *leaves[:3],
        causal=True,
        deterministic=True,
        return_attn_probs=True,
        learnable_sink=leaves[3],
    )
    seeds = [inputs.dout.to(device), inputs.dlse.to(device)]
    torch.autograd.backward([out, lse], seeds)
    for leaf, name in zip(leaves, ("dq", "dk", "dv", "dsink"), strict=True):
        if leaf.requires_grad:
            assert torch.equal(leaf.grad, full[name]), name
        else:
            assert leaf.grad is None


def test_sink_alone_needs_no_main_pass(device):
    """Only the sink wants a gradient: the prepare pass is all that runs."""
    case = Case(2, 130, 60, (6, 2), (64, 64), "bf16")
    x = make_inputs(case)
    truth = run(oracle_function(), x, torch.float64)
    out = truth["out"].to(torch.bfloat16)
    arguments = [x.dout, x.dlse, x.q, x.k, x.v, out, truth["lse"].float()]
    arguments = [t.to(device) for t in arguments]
    dq, dk, dv, dsink = torch.ops.sinkattn.bwd(
        *arguments, need_dq=False, need_dkv=False, learnable_sink=x.sink.to(device)
    )
    assert dq.numel() == dk.numel() == dv.numel() == 0
    expected = -(
        torch.exp(x.sink.double()[None, :, None] - truth["lse"])
        * ((x.dout.double() * out.double()).sum(-1).transpose(1, 2) - x.dlse.double())
    ).sum((0, 2))
    torch.testing.assert_close(dsink.cpu().double(), expected, rtol=1e-4, atol=1e-4)
