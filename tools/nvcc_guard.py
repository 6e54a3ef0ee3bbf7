# SPDX-License-Identifier: Apache-2.0
"""Runs nvcc and fails if a kernel came out slow.

    nvcc_guard.py nvcc <arguments>

Spills, local memory and a serialised wgmma pipeline cost a multiple of what any tuning gains, and
ptxas reports some of them as remarks only. The whole output is kept beside the object file as
`<object>.ptxas.log`; what fails the build is printed and the object is removed.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

# C7500 to C7599 is the family of ptxas remarks about wgmma (serialised, injected wait or arrive).
_REMARK = re.compile(r"\(C75\d\d\)|Potential Performance Loss", re.IGNORECASE)
_IGNORED_SETMAXNREG = re.compile(r"setmaxnreg.*ignored", re.IGNORECASE)
_KERNEL = re.compile(r"Compiling entry function '([^']+)'")
_STACK = re.compile(
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", re.IGNORECASE
)
# Statistics that -Xptxas -v prints for every kernel: kept in the log, not shown.
_STATISTIC = re.compile(r"^(ptxas info\s*:|\s+\d+ bytes stack frame|\s*$)")


def findings(log: str) -> list[str]:
    """The lines of a ptxas log that a release kernel must not have, each with its kernel."""
    found = []
    kernel = "?"
    for line in log.splitlines():
        if match := _KERNEL.search(line):
            kernel = match.group(1)
        if _REMARK.search(line) or _IGNORED_SETMAXNREG.search(line):
            found.append(line.strip())
        elif (match := _STACK.search(line)) and any(int(n) for n in match.groups()):
            found.append(f"{kernel}: {line.strip()}")
    return found


def _argument_after(arguments: list[str], flag: str) -> str | None:
    if flag in arguments[:-1]:
        return arguments[arguments.index(flag) + 1]
    return None


def main(arguments: list[str]) -> int:
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    run = subprocess.run(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    output = _argument_after(arguments, "-o")
    if output is not None:
        Path(output + ".ptxas.log").write_text(run.stdout)
    bad = findings(run.stdout)
    if run.returncode != 0 or bad:
        print(run.stdout if run.returncode else "\n".join(bad), file=sys.stderr)
        if bad:
            print(f"error: {output}: spills, local memory or serialised wgmma", file=sys.stderr)
            Path(output or "").unlink(missing_ok=True) if output else None
        return run.returncode or 1
    for line in run.stdout.splitlines():
        if not _STATISTIC.match(line):
            print(line, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
