# SPDX-License-Identifier: Apache-2.0
"""Command line of the benchmark."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .cases import GROUPS
from .environment import Environment
from .host import host_table
from .providers import DEFAULTS, PROVIDERS
from .report import picture, table, write_csv, write_environment
from .run import run_case, say
from .timing import Timer


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sinkattn.bench",
        description="Times attention with a sink beside other implementations, checks every result "
        "against an fp32 reference and prints milliseconds, rates and ratios.",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if usable")
    parser.add_argument(
        "--group", choices=tuple(GROUPS), action="append", help="default: all that fit"
    )
    parser.add_argument("--providers", help=f"comma-separated, of: {', '.join(PROVIDERS)}")
    parser.add_argument("--directions", default="fwd,bwd", help="fwd, bwd or fwd,bwd")
    parser.add_argument("--filter", default="", help="only cases whose label contains this text")
    parser.add_argument("--timing", choices=("eager", "graph"), help="override the cases' own mode")
    parser.add_argument(
        "--keep-l2", action="store_true", help="calls in a row instead of one behind an L2 flush"
    )
    parser.add_argument("--baseline", help="provider of the ratios; default sdpa-cudnn or eager")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="path prefix for .csv, .json and .png")
    parser.add_argument(
        "--host", action="store_true", help="only what a call costs the host, layer by layer"
    )
    options = parser.parse_args(arguments)
    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.group is None:
        options.group = ["cpu"] if options.device == "cpu" else ["training", "decode"]
    names = options.providers.split(",") if options.providers else DEFAULTS[options.device]
    unknown = [name for name in names if name not in PROVIDERS]
    if unknown:
        parser.error(f"--providers: expected names of {', '.join(PROVIDERS)}, got {unknown}")
    options.providers = [PROVIDERS[name]() for name in names]
    options.directions = options.directions.split(",")
    if set(options.directions) - {"fwd", "bwd"}:
        parser.error(f"--directions: expected fwd and/or bwd, got {options.directions}")
    if options.baseline is None:
        options.baseline = "eager" if options.device == "cpu" else "sdpa-cudnn"
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    if options.host:
        print(host_table(device))
        return 0
    torch.backends.cuda.matmul.allow_tf32 = False
    environment = Environment.measure(device)
    timer = Timer(device, repeats=options.repeats, keep_l2=options.keep_l2)
    say(f"{environment.gpu}, copy {environment.copy_bytes_per_second / 1e9:.0f} GB/s")
    cases = [case for group in options.group for case in GROUPS[group]()]
    cases = [case for case in cases if options.filter in case.label]
    rows = []
    for index, case in enumerate(cases, 1):
        say(f"[{index}/{len(cases)}] {case.label}")
        for row in run_case(
            case, options.providers, options.directions, environment, timer, options.timing
        ):
            rows.append(row)
            say(
                f"    {row['provider']:<24}{row['direction']:<8}{row['ms']:10.4f} ms "
                f"{row['tflops']:8.1f} TFLOPS  error {row['error']}"
            )
        environment.log_state()
    if not rows:
        say("nothing was measured")
        return 1
    print(table(rows, options.baseline))
    if options.out:
        write_csv(rows, options.out.with_suffix(".csv"))
        facts = environment.as_dict() | {"l2": "kept" if options.keep_l2 else "flushed"}
        write_environment(facts, options.out.with_suffix(".json"))
        title = f"{environment.gpu}, {environment.date}, commit {environment.commit}"
        picture(rows, options.out.with_suffix(".png"), title)
        say(f"written: {options.out.with_suffix('.csv')}, .json, .png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
