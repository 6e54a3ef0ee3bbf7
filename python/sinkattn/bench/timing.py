# SPDX-License-Identifier: Apache-2.0
"""Timing of device work: events around each call, L2 flushed before it, medians of many."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

import torch

FLUSH_BYTES = 256 << 20  # several times the L2 of any Hopper GPU
CALLS_IN_A_ROW = 20  # of a sample without a flush


class Timer:
    """Times a set of functions interleaved, so that drifting clocks hit all of them alike.

    A sample on a GPU is one call behind a flush of the L2, or with `keep_l2` the mean of calls one
    right behind the other, as a model's layers follow each other.
    """

    def __init__(
        self,
        device: torch.device,
        warmups: int = 5,
        repeats: int = 20,
        seed: int = 0,
        keep_l2: bool = False,
    ):
        self.device = device
        self.warmups = warmups
        self.repeats = repeats
        self._random = random.Random(seed)
        self._flush = None
        if device.type == "cuda" and not keep_l2:
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def median_ms(self, functions: dict[str, Callable[[], object]]) -> dict[str, float]:
        """Median milliseconds of each function over `repeats` interleaved calls."""
        samples: dict[str, list[float]] = {name: [] for name in functions}
        for function in functions.values():
            for _ in range(self.warmups):
                function()
        names = list(functions)
        for _ in range(self.repeats):
            self._random.shuffle(names)
            for name in names:
                samples[name].append(self._once(functions[name]))
        return {name: statistics.median(values) for name, values in samples.items()}

    def _once(self, function: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            function()
            return (time.perf_counter() - start) * 1e3
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        calls = CALLS_IN_A_ROW
        if self._flush is not None:
            self._flush.zero_()
            calls = 1
        begin.record()
        for _ in range(calls):
            function()
        end.record()
        torch.cuda.synchronize(self.device)
        return begin.elapsed_time(end) / calls


def graphed(prepare: Callable[[], Callable[[], object]]) -> Callable[[], object]:
    """Captures the function that `prepare()` returns and gives back its replay.

    `prepare` runs on the capture stream, so that autograd's backward is captured there too.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function = prepare()
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()

    def replay():
        graph.replay()

    replay.captured = function  # it alone holds tensors that the graph reads
    return replay


def copy_rate(device: torch.device) -> float:
    """Device-to-device copy rate in bytes per second, counting bytes read and written."""
    size = (1 << 30) if device.type == "cuda" else (64 << 20)
    source = torch.empty(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    timer = Timer(device, warmups=2, repeats=7)
    return 2 * size / (timer.median_ms({"copy": lambda: target.copy_(source)})["copy"] * 1e-3)


def matmul_rate(device: torch.device) -> float:
    """Rate of an 8192^3 bf16 matrix product on random data, FLOP per second (CUDA only)."""
    n = 8192
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    b = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    timer = Timer(device, warmups=3, repeats=7)
    return 2 * n**3 / (timer.median_ms({"mm": lambda: torch.matmul(a, b)})["mm"] * 1e-3)
