# SPDX-License-Identifier: Apache-2.0
"""Runs cases x providers x directions and yields one row per measurement."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

from .cases import Case
from .environment import Environment
from .providers import Inputs, Provider, make_inputs
from .timing import Timer, graphed
from .verify import Reference, reference, relative_error

CASE_COLUMNS = (
    *("direction", "batch", "seqlen_q", "seqlen_k", "heads_q", "heads_kv", "headdim", "headdim_v"),
    *("mask", "window_left", "window_right", "varlen", "dtype"),
)
COLUMNS = (
    *("date", "gpu", "driver", "commit", "provider", "version"),
    *CASE_COLUMNS,
    *("sink", "deterministic", "timing", "ms", "tflops", "gbps", "limit_ms", "error"),
)


def say(text: str) -> None:
    """Progress goes to stderr; stdout holds the tables."""
    print(text, file=sys.stderr, flush=True)


class Candidate:
    """One provider on one case: its forward, its backward, and its error against the reference."""

    def __init__(self, provider: Provider, case: Case, inputs: Inputs):
        self.provider = provider
        self.case = case
        self.inputs = inputs
        self.attend = provider.forward_function(case, inputs)
        self.leaves = [
            x.detach().clone().requires_grad_(not case.decode)
            for x in (inputs.query, inputs.key, inputs.value, inputs.sink)
        ]

    def wanted(self) -> list[torch.Tensor]:
        return self.leaves if self.provider.has_sink else self.leaves[:3]

    def forward(self) -> torch.Tensor:
        with torch.no_grad():
            return self.attend(*self.leaves)

    def prepare_backward(self):
        """Runs the forward once and returns a function that runs the backward alone."""
        out = self.attend(*self.leaves)

        def backward():
            return torch.autograd.grad(out, self.wanted(), self.inputs.dout, retain_graph=True)

        return backward

    def function(self, direction: str, timing: str):
        prepare = self.prepare_backward if direction == "bwd" else lambda: self.forward
        return graphed(prepare) if timing == "graph" else prepare()

    def error(self, direction: str, expected: Reference) -> float:
        """Largest relative L2 error over the results of KV head 0 and its query heads."""
        group = self.case.heads_q // self.case.heads_kv
        if direction != "bwd":
            return relative_error(self.forward()[..., :group, :], expected.out)
        gradients = self.prepare_backward()()
        pairs = [
            (gradients[0][..., :group, :], expected.dq),
            (gradients[1][..., 0, :], expected.dk),
            (gradients[2][..., 0, :], expected.dv),
        ]
        if self.provider.has_sink:
            pairs.append((gradients[3][:group], expected.dsink))
        return max(relative_error(ours, truth) for ours, truth in pairs)


def run_case(
    case: Case,
    providers: list[Provider],
    directions: list[str],
    environment: Environment,
    timer: Timer,
    timing: str | None = None,
) -> Iterator[dict[str, object]]:
    """Rows of one case. `timing` overrides the case's own mode (eager or graph)."""
    device = environment.device
    mode = (timing or case.timing) if device.type == "cuda" else "eager"
    inputs = make_inputs(case, device)
    for direction in ("decode",) if case.decode else directions:
        ready: dict[str, Candidate] = {}
        functions = {}
        errors: dict[str, float] = {}
        references: dict[bool, Reference] = {}
        for provider in providers:
            try:
                provider.check_device(device)
                candidate = Candidate(provider, case, inputs)
                with_sink = provider.has_sink
                if with_sink not in references:
                    references[with_sink] = reference(case, inputs, with_sink, direction == "bwd")
                errors[provider.name] = candidate.error(direction, references[with_sink])
                functions[provider.name] = candidate.function(direction, mode)
                ready[provider.name] = candidate
            except (RuntimeError, TypeError, ValueError) as error:
                reason = str(error).strip().splitlines() or [type(error).__name__]
                say(f"    {provider.name:<24}{direction:<8}not measured: {reason[0][:160]}")
        references.clear()
        if not functions:
            continue
        for name, ms in timer.median_ms(functions).items():
            yield _row(case, ready[name].provider, direction, mode, ms, errors[name], environment)
        del functions, ready
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _row(case, provider, direction, mode, ms, error, environment) -> dict[str, object]:
    work = "bwd" if direction == "bwd" else "fwd"
    limit = ""
    if environment.device.type == "cuda":
        limit = round(case.limit_ms(work, environment.copy_bytes_per_second), 5)
    return {
        "date": environment.date,
        "gpu": environment.gpu,
        "driver": environment.driver,
        "commit": environment.commit,
        "provider": provider.name,
        "version": provider.version(),
        "direction": direction,
        "batch": case.batch,
        "seqlen_q": case.seqlen_q,
        "seqlen_k": case.seqlen_k,
        "heads_q": case.heads_q,
        "heads_kv": case.heads_kv,
        "headdim": case.headdim,
        "headdim_v": case.headdim_v,
        "mask": case.mask,
        "window_left": case.window_left,
        "window_right": case.window_right,
        "varlen": "+".join(map(str, case.lengths)),
        "dtype": case.dtype,
        "sink": "fp32" if provider.has_sink else "none",
        "deterministic": int(getattr(provider, "deterministic", False)),
        "timing": mode,
        "ms": round(ms, 5),
        "tflops": float(f"{case.flops(work) / ms / 1e9:.4g}"),
        "gbps": round(case.bytes(work) / ms / 1e6, 1),
        "limit_ms": limit,
        "error": f"{error:.3e}",
    }
