# SPDX-License-Identifier: Apache-2.0
"""A self-test in seconds: every result of a few calls against the float64 oracle."""

from __future__ import annotations

import time

import torch

from ._info import unavailable_reason
from .interface import flash_attn_func

# (b, sq, sk, h, hk, d, options): the masks and group sizes that models use.
CASES = (
    (2, 96, 96, 8, 2, 64, {"causal": True}),
    (1, 130, 130, 8, 1, 64, {"causal": True, "window_size": (31, 0)}),
    (2, 33, 70, 6, 6, 128, {}),
    (1, 64, 128, 12, 4, 96, {"causal": True, "softcap": 15.0}),
)
# Relative L2 error; several times what rounding to the dtype costs (2^-9 for bf16).
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}


def _results(tensors, options):
    leaves = [x.detach().requires_grad_() for x in tensors[:4]]
    out = flash_attn_func(*leaves[:3], learnable_sink=leaves[3], **options)
    return (out, *torch.autograd.grad(out, leaves, tensors[4].to(out.dtype)))


def _error(result, truth) -> float:
    difference = (result.detach().cpu().double() - truth.detach()).norm()
    return float(difference / truth.detach().norm().clamp_min(1e-30))


def run() -> int:
    """0 if every error is within its tolerance."""
    devices = [("cpu", torch.float32), ("cpu", torch.bfloat16)]
    reason = unavailable_reason()
    if reason is None:
        devices += [("cuda", torch.bfloat16), ("cuda", torch.float16)]
    else:
        print(f"CUDA is not checked: {reason}")
    failures = 0
    for b, sq, sk, h, hk, d, options in CASES:
        generator = torch.Generator().manual_seed(0)
        shapes = ((b, sq, h, d), (b, sk, hk, d), (b, sk, hk, d), (h,), (b, sq, h, d))
        inputs = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
        for device, dtype in devices:
            rounded = [x.to(dtype if x.dim() > 1 else torch.float32) for x in inputs]
            truth = _results([x.double() for x in rounded], options)
            started = time.perf_counter()
            try:
                results = _results([x.to(device) for x in rounded], options)
            except NotImplementedError as error:
                print(f"skipped {device} {dtype}: {error}")
                continue
            milliseconds = (time.perf_counter() - started) * 1e3
            errors = [_error(x, t) for x, t in zip(results, truth, strict=True)]
            good = all(e <= TOLERANCE[dtype] for e in errors)  # False for NaN
            failures += not good
            names = zip(("out", "dq", "dk", "dv", "dsink"), errors, strict=True)
            text = "  ".join(f"{name} {e:.1e}" for name, e in names)
            print(
                f"{'ok    ' if good else 'FAILED'} {device} {str(dtype)[6:]:<9} b{b} {sq}x{sk} "
                f"h{h}/{hk} d{d} {options or 'full'}: {text}  ({milliseconds:.1f} ms)"
            )
    print("all good" if failures == 0 else f"{failures} cases are outside their tolerance")
    return 1 if failures else 0
