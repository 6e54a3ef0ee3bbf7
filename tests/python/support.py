# SPDX-License-Identifier: Apache-2.0
"""Cases, inputs, oracles and the error rule of the numerical tests."""

from __future__ import annotations

import itertools
import random
import zlib
from dataclasses import dataclass, field

import sinkattn
import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One dense or packed problem; `options` are keyword arguments of the public functions."""

    batch: int
    sq: int
    sk: int
    heads: tuple[int, int]
    dims: tuple[int, int]
    dtype: str
    options: tuple = ()
    sink: str = "fp32"  # none, or the sink's dtype, "x4" for a wide one, "mixed" with -inf
    extra: dict = field(default_factory=dict, hash=False)

    def __str__(self):
        mask = ",".join(f"{k}={v}" for k, v in self.options)
        return (
            f"b{self.batch}-{self.sq}x{self.sk}-h{self.heads[0]}.{self.heads[1]}-"
            f"d{self.dims[0]}.{self.dims[1]}-{self.dtype}-sink_{self.sink}-{mask}"
        )

    @property
    def kwargs(self) -> dict:
        return dict(self.options)

    @property
    def seed(self) -> int:
        return zlib.crc32(str(self).encode())


def make_sink(case: Case, generator) -> torch.Tensor | None:
    if case.sink == "none":
        return None
    values = torch.randn(case.heads[0], generator=generator)
    if case.sink == "x4":
        values = 4 * values
    if case.sink == "mixed":
        values[::2] = float("-inf")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(case.sink, torch.float32)
    return values.to(dtype)


@dataclass
class Inputs:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    sink: torch.Tensor | None
    dout: torch.Tensor
    dlse: torch.Tensor


def make_inputs(case: Case) -> Inputs:
    """Normal random CPU tensors rounded to the case's dtype."""
    g = torch.Generator().manual_seed(case.seed)
    h, hk = case.heads
    d, dv = case.dims
    dtype = DTYPES.get(case.dtype, torch.float64)
    softcap = case.kwargs.get("softcap", 0.0)
    q = torch.randn(case.batch, case.sq, h, d, generator=g) * (softcap / 4 if softcap else 1)
    k = torch.randn(case.batch, case.sk, hk, d, generator=g)
    v = torch.randn(case.batch, case.sk, hk, dv, generator=g)
    sink = make_sink(case, g)
    dout = torch.randn(case.batch, case.sq, h, dv, generator=g)
    dlse = torch.randn(case.batch, h, case.sq, generator=g)
    return Inputs(q.to(dtype), k.to(dtype), v.to(dtype), sink, dout.to(dtype), dlse)


def run(function, inputs: Inputs, dtype=None, device="cpu", use_lse=True) -> dict:
    """Forward and backward of `function(q, k, v, sink) -> (out, lse)` with a loss on both."""

    def place(x):
        if x is None:
            return None
        x = x.to(device)
        return x if dtype is None else x.to(dtype)

    leaves = [place(x) for x in (inputs.q, inputs.k, inputs.v, inputs.sink)]
    leaves = [None if x is None else x.detach().requires_grad_() for x in leaves]
    out, lse = function(*leaves)
    wanted = [x for x in leaves if x is not None]
    outputs = [out]
    seeds = [inputs.dout.to(device=device, dtype=out.dtype)]
    if use_lse:
        outputs.append(lse)
        seeds.append(inputs.dlse.to(device=device, dtype=lse.dtype))
    # Rows without any key have LSE -inf (a constant): eager autograd needs their seed to be 0.
    if use_lse:
        seeds[1] = torch.where(torch.isinf(lse.detach()), torch.zeros_like(seeds[1]), seeds[1])
    gradients = torch.autograd.grad(outputs, wanted, seeds, allow_unused=True)
    result = {"out": out.detach(), "lse": lse.detach()}
    for name, leaf in zip(("dq", "dk", "dv", "dsink"), leaves, strict=True):
        if leaf is not None:
            gradient = gradients[[x is leaf for x in wanted].index(True)]
            result[name] = torch.zeros_like(leaf) if gradient is None else gradient
    return result


def oracle_function(**options):
    """The C++ oracle: the public function on float64 CPU tensors."""
    return lambda q, k, v, sink: sinkattn.flash_attn_func(
        q, k, v, learnable_sink=sink, return_attn_probs=True, **options
    )


def reference_function(dtype, **options):
    options = {
        k: v for k, v in options.items() if k not in ("deterministic", "num_splits", "pack_gqa")
    }
    return lambda q, k, v, sink: sinkattn.attention_reference(
        q, k, v, learnable_sink=sink, compute_dtype=dtype, **options
    )


def check(result: dict, truth: dict, same: dict, dtype, softcap=0.0, factor=None) -> None:
    """The field's error rule: at most `factor` times the error of the same formula evaluated in the
    input dtype, plus the rounding of the result itself; NaN and infinities at the same places."""
    factor = factor or (3 if softcap else 2)
    for name, actual in result.items():
        expected = truth[name].double().cpu()
        actual = actual.double().cpu()
        assert actual.shape == expected.shape, name
        assert torch.equal(actual.isnan(), expected.isnan()), f"{name}: NaN positions differ"
        infinite = expected.isinf()
        assert torch.equal(actual[infinite], expected[infinite]), f"{name}: infinities differ"
        finite = ~(infinite | expected.isnan())
        if not finite.any():
            continue
        error = (actual - expected)[finite].abs()
        if name == "lse":
            scale = max(1.0, float(expected[finite].abs().max()) / 8)
            limit = (1e-4 if dtype != torch.float32 else 1e-5) * scale
            assert float(error.max()) <= limit, f"lse: {float(error.max()):.3e} > {limit:.3e}"
            continue
        pt_error = (same[name].double().cpu() - expected)[finite].abs()
        rounded = expected.to(actual_dtype(name, dtype, result))
        slack = 2 * float(((rounded + 0.3) - 0.3 - rounded)[finite].double().abs().max())
        if name != "out" and softcap:
            slack += 3e-4
        if name == "dsink":
            slack += 2 * float(torch.finfo(result[name].dtype).eps * expected.abs().max())
        limit = factor * float(pt_error.max()) + slack
        assert float(error.max()) <= limit, f"{name}: max {float(error.max()):.3e} > {limit:.3e}"
        mean_limit = 1.5 * float(pt_error.mean()) + slack / 4
        if name != "dsink":
            mean = float(error.mean())
            assert mean <= mean_limit, f"{name}: mean {mean:.3e} > {mean_limit:.3e}"


def actual_dtype(name: str, dtype, result: dict):
    return result[name].dtype if name == "dsink" else dtype


def close(result: dict, truth: dict, rtol: float) -> None:
    """Largest difference over the largest magnitude, per tensor; results in a 16-bit dtype (the
    gradient of a 16-bit sink) may also differ by the rounding to it."""
    for name, actual in result.items():
        expected = truth[name].double().cpu()
        rounding = torch.finfo(actual.dtype).eps if actual.element_size() == 2 else 0.0
        actual = actual.double().cpu()
        assert torch.equal(actual.isnan(), expected.isnan()), name
        assert torch.equal(actual.isinf(), expected.isinf()), name
        finite = expected.isfinite()
        if not finite.any():
            continue
        error = float((actual - expected)[finite].abs().max())
        scale = max(1e-3, float(expected[finite].abs().max()))
        assert error <= (rtol + rounding) * scale, f"{name}: {error:.3e} of {scale:.3e}"


def pairwise(axes: dict[str, list], seed: int = 0) -> list[dict]:
    """A small set of combinations in which every pair of values of two axes occurs (greedy)."""
    rng = random.Random(seed)
    names = list(axes)
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in range(len(axes[names[a]]))
        for j in range(len(axes[names[b]]))
    }
    rows = []
    while missing:
        best, best_gain = None, -1
        for _ in range(40):
            row = [rng.randrange(len(axes[name])) for name in names]
            (a, i), (b, j) = (
                min(missing) if rng.random() < 0.2 else rng.choice(sorted(missing)[:50])
            )
            row[a], row[b] = i, j
            gain = sum(
                ((x, row[x]), (y, row[y])) in missing
                for x, y in itertools.combinations(range(len(names)), 2)
            )
            if gain > best_gain:
                best, best_gain = row, gain
        for x, y in itertools.combinations(range(len(names)), 2):
            missing.discard(((x, best[x]), (y, best[y])))
        rows.append({name: axes[name][i] for name, i in zip(names, best, strict=True)})
    return rows


# Options of flash_attn_func with which a call is a plain one (see attend_dense).
PLAIN_OPTIONS = [
    {},
    {"causal": True, "softmax_scale": 0.3},
    {"window_size": (3, -1), "causal": True},
    {"window_size": (-5, 2)},
    {"deterministic": True, "return_attn_probs": True},
]
