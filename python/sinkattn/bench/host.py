# SPDX-License-Identifier: Apache-2.0
"""What a call costs the host: from the Python function to the launch, layer by layer.

The clock stops when the call returns, so on a GPU the kernel's own time is not in it. Two problems:
an empty batch, which every layer handles alike but for which nothing runs or is launched, and on a
GPU one small problem that launches a kernel.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import torch

import sinkattn

from .._execute import make_options
from ..autograd import FORWARD, apply_eager, forward_dense_no_lse
from .environment import commit_of_checkout

CALLS = 1000
# A GPU's queue holds about a thousand launches; a host that fills it waits for the GPU.
CALLS_BETWEEN_WAITS = 64
LIMITS_US = {"flash_attn_func, no grad": 10.0, "flash_attn_func, grad": 20.0}


def median_us(function: Callable[[], object], device: torch.device, calls: int = CALLS) -> float:
    """Median host microseconds of single calls."""
    clock = time.perf_counter_ns
    samples = []
    for index in range(-calls // 5, calls):
        if index % CALLS_BETWEEN_WAITS == 0 and device.type == "cuda":
            torch.cuda.synchronize(device)
        start = clock()
        result = function()
        took = clock() - start
        del result  # outside: freeing is not part of the way to the launch
        if index >= 0:
            samples.append(took)
    return statistics.median(samples) / 1e3


def layers(device: torch.device, batch: int) -> dict[str, Callable[[], object]]:
    """The dense causal call with a sink at every layer, outermost first."""

    def tensors(gradient: bool):
        def leaf(*shape, dtype=torch.bfloat16):
            x = torch.zeros(*shape, device=device, dtype=dtype)
            return x.requires_grad_(gradient)

        kv = batch, 256, 2, 128
        return (leaf(batch, 256, 4, 128), leaf(*kv), leaf(*kv), leaf(4, dtype=torch.float32))

    q, k, v, sink = tensors(gradient=False)
    gq, gk, gv, gsink = tensors(gradient=True)
    options = make_options(causal=True, window_size=(-1, -1))
    plain = (None, True, -1, -1, False)

    def public(q, k, v, sink, **more):
        return lambda: sinkattn.flash_attn_func(q, k, v, causal=True, learnable_sink=sink, **more)

    return {
        "flash_attn_func, no grad": public(q, k, v, sink),
        "  the operator of plain calls": lambda: forward_dense_no_lse(q, k, v, sink, *plain[:4]),
        "flash_attn_func, grad": public(gq, gk, gv, gsink),
        "  the operator's autograd function": lambda: apply_eager(gq, gk, gv, gsink, plain),
        "with softcap, no grad (general path)": public(q, k, v, sink, softcap=30.0),
        "  the general operator": lambda: FORWARD(q, k, v, *options[:-1], sink),
        "with softcap, grad (general path)": public(gq, gk, gv, gsink, softcap=30.0),
        "  the general autograd function": lambda: apply_eager(gq, gk, gv, gsink, options),
        "torch: two empty tensors": lambda: (
            torch.empty_like(q),
            q.new_empty((batch, 4, 256), dtype=torch.float32),
        ),
        "an empty function": lambda: None,
    }


def host_table(device: torch.device) -> str:
    """Medians of CALLS calls in microseconds, as text."""
    columns = {"nothing to run": 0} | ({"with a launch": 1} if device.type == "cuda" else {})
    times = {
        title: {name: median_us(call, device) for name, call in layers(device, batch).items()}
        for title, batch in columns.items()
    }
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    lines = [
        f"host microseconds, median of {CALLS} calls: {name}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, commit {commit_of_checkout()}",
        " " * 40 + "".join(f"{title:>16}" for title in columns) + f"{'limit':>8}",
    ]
    for layer in layers(device, 0):
        row = "".join(f"{times[title][layer]:16.2f}" for title in columns)
        limit = LIMITS_US.get(layer)
        lines.append(f"{layer:<40}{row}" + ("" if limit is None else f"{limit:8.0f}"))
    return "\n".join(lines)
