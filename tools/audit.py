# SPDX-License-Identifier: Apache-2.0
"""What a shared library asks of the machine that loads it, read with readelf (binutils).

python tools/audit.py <library.so>
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# C functions of torch's stable ABI; C++ names of torch, at or c10 are promised to nobody.
STABLE_SHIM = re.compile(r"^(aoti_torch|torch)_[a-z0-9_]+$")
# Weak references the compiler's start files make; resolving to nothing is fine.
_START_FILES = {
    "__cxa_finalize",
    "__gmon_start__",
    "_ITM_deregisterTMCloneTable",
    "_ITM_registerTMCloneTable",
}


@dataclass(frozen=True)
class Symbol:
    name: str
    version: str  # for example GLIBC_2.34; empty for symbols of unversioned libraries
    binding: str  # GLOBAL or WEAK
    defined: bool


def _readelf(*arguments: str | Path) -> str:
    command = ["readelf", "-W", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def needed(library: Path) -> set[str]:
    return set(re.findall(r"\(NEEDED\).*\[(.+?)\]", _readelf("-d", library)))


def search_paths(library: Path) -> list[str]:
    return re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*?)\]", _readelf("-d", library))


def has_executable_stack(library: Path) -> bool:
    (flags,) = re.findall(r"GNU_STACK(?:\s+0x\w+){5}\s+([RWE]+)", _readelf("-l", library))
    return "E" in flags


def symbols(library: Path) -> list[Symbol]:
    """The dynamic symbols: what is asked of others and what is offered to them."""
    found = []
    for line in _readelf("--dyn-syms", library).splitlines():
        fields = line.split()
        if len(fields) < 8 or not fields[0].rstrip(":").isdigit() or fields[4] == "LOCAL":
            continue
        name, _, version = fields[7].partition("@")
        found.append(Symbol(name, version.strip("@"), fields[4], fields[6] != "UND"))
    return found


def unstable_symbols(library: Path) -> list[str]:
    """Undefined symbols that are neither the system's nor torch's stable C functions."""
    return sorted(
        symbol.name
        for symbol in symbols(library)
        if not symbol.defined
        and not symbol.version
        and symbol.name not in _START_FILES
        and not STABLE_SHIM.match(symbol.name)
    )


def version_floor(library: Path, family: str) -> tuple[int, ...]:
    """Newest version of GLIBC, GLIBCXX, ... that a symbol of the library asks for."""
    pattern = re.compile(rf"^{family}_(\d+(?:\.\d+)+)$")
    matches = (pattern.match(s.version) for s in symbols(library) if not s.defined)
    return max((tuple(int(n) for n in m.group(1).split(".")) for m in matches if m), default=(0,))


def platform_tag(library: Path) -> str:
    major, minor, *_ = version_floor(library, "GLIBC")
    return f"manylinux_{major}_{minor}_{platform.machine()}"


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    library = Path(arguments[0])
    print("needed:          ", *sorted(needed(library)))
    print("search paths:    ", *search_paths(library) or ["none"])
    print("executable stack:", has_executable_stack(library))
    print("foreign symbols: ", *unstable_symbols(library) or ["none"])
    print("exported:        ", sum(s.defined for s in symbols(library)))
    for family in ("GLIBC", "GLIBCXX"):
        print(f"{family + ' floor:':17}", ".".join(map(str, version_floor(library, family))))
    print("platform tag:    ", platform_tag(library))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
