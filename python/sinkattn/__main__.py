# SPDX-License-Identifier: Apache-2.0
"""python -m sinkattn info | check | demo"""

from __future__ import annotations

import sys


def info() -> int:
    """Prints what is installed and what can run here."""
    from sinkattn import build_info

    facts = build_info()
    for name, value in facts.items():
        print(f"{name:<18}{value}")
    reason = facts["cuda_unavailable"]
    print("CPU tensors: yes.  CUDA tensors: " + ("yes" if reason is None else f"no, {reason}"))
    return 0


def check() -> int:
    """Compares forward and backward with the float64 oracle on a few shapes."""
    from sinkattn._selftest import run

    return run()


def demo(arguments: list[str]) -> int:
    """Trains a small model with learnable sinks."""
    from sinkattn.demo import main as run_demo

    return run_demo(arguments)


def main(arguments: list[str]) -> int:
    command = arguments[0] if arguments else ""
    if command == "info" and len(arguments) == 1:
        return info()
    if command == "check" and len(arguments) == 1:
        return check()
    if command == "demo":
        return demo(arguments[1:])
    print("usage: python -m sinkattn info | check | demo [--help]", file=sys.stderr)
    return 0 if command in ("-h", "--help") else 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
