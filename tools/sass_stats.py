# SPDX-License-Identifier: Apache-2.0
"""Machine code statistics of every kernel, compared with the stored table.

    python tools/sass_stats.py [--update] [--library <path>]

Counts what decides a kernel's speed (tensor-core instructions, exponentials, shared-memory
traffic) and what it occupies (registers, shared memory, spills). The table is
tools/sass_expected.json; a change of it belongs into the commit that caused it. Numbers of another
ptxas version are not comparable: the table names the one it was made with.
Needs cuobjdump and nvdisasm, from a CUDA toolkit or from their wheels.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "python" / "sinkattn" / "lib" / "libsinkattn_torch.so"
EXPECTED = Path(__file__).with_name("sass_expected.json")

# Opcode families; a trailing part after the dot (as in LDS.128) counts with its family.
FAMILIES = {
    "HGMMA": ("HGMMA",),
    "MUFU": ("MUFU",),
    "LDS": ("LDS", "LDSM"),
    "STS": ("STS", "STSM"),
    "LDG": ("LDG",),
    "STG": ("STG",),
    "RED": ("RED", "REDG", "ATOM", "ATOMG", "ATOMS"),
    "TMA": ("UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP", "UBLKRED"),
    "SHFL": ("SHFL",),
    "BAR": ("BAR", "SYNCS", "WARPSYNC"),
    "local": ("LDL", "STL"),
}
_FUNCTION = re.compile(r"^\s*Function : (\S+)")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")
_RESOURCES = re.compile(r"^\s*Function (\S+):\n\s*(.*)$", re.MULTILINE)
_RESOURCE = re.compile(r"(REG|STACK|SHARED|LOCAL):(\d+)")


class ToolsMissing(Exception):
    """cuobjdump or nvdisasm is not installed."""


def tool_path() -> str:
    """A PATH on which cuobjdump and nvdisasm are found, toolkit first, wheels second."""
    folders = [os.environ["PATH"], "/usr/local/cuda/bin"]
    folders += [str(Path(folder, "nvidia", "cu13", "bin")) for folder in sys.path]
    path = os.pathsep.join(folders)
    for tool in ("cuobjdump", "nvdisasm"):
        if shutil.which(tool, path=path) is None:
            raise ToolsMissing(f"{tool} is not installed")
    return path


def _dump(library: Path, option: str) -> str:
    path = tool_path()
    command = [shutil.which("cuobjdump", path=path), option, str(library)]
    env = dict(os.environ, PATH=path)
    return subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout


def _demangled(names: list[str]) -> dict[str, str]:
    filtered = subprocess.run(
        ["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True
    ).stdout.splitlines()
    return dict(zip(names, filtered, strict=True))


def count_instructions(sass: str) -> dict[str, Counter]:
    """Opcode counts of each function in the output of `cuobjdump -sass`."""
    family_of = {opcode: family for family, group in FAMILIES.items() for opcode in group}
    counts: dict[str, Counter] = {}
    current = None
    for line in sass.splitlines():
        if match := _FUNCTION.match(line):
            current = counts.setdefault(match.group(1), Counter())
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current["instructions"] += 1
            if family := family_of.get(match.group(1)):
                current[family] += 1
    return counts


def kernel_statistics(library: Path) -> dict[str, dict[str, int]]:
    counts = count_instructions(_dump(library, "-sass"))
    resources = {
        name: {key.lower(): int(value) for key, value in _RESOURCE.findall(line)}
        for name, line in _RESOURCES.findall(_dump(library, "-res-usage"))
    }
    readable = _demangled(sorted(counts))
    rows: dict[str, dict[str, int]] = {}
    for name, counted in sorted(counts.items(), key=lambda item: (readable[item[0]], item[0])):
        label = readable[name]
        if label in rows:  # the same name in the unnamed namespace of another file
            label = f"{label} {name}"
        rows[label] = resources.get(name, {}) | {"instructions": counted["instructions"]}
        rows[label] |= {family: counted[family] for family in FAMILIES if counted[family]}
    return rows


def compiler_version(library: Path) -> str:
    """The ptxas that made the machine code, from the note it leaves in the binary."""
    versions = set(
        re.findall(rb"Cuda compilation tools, release [\d.]+, V([\d.]+)", library.read_bytes())
    )
    return ", ".join(sorted(v.decode() for v in versions)) or "unknown"


def table(library: Path) -> dict:
    return {"compiler": compiler_version(library), "kernels": kernel_statistics(library)}


def as_text(content: dict) -> str:
    """One line per kernel, so that a diff shows kernels and not numbers without a name."""
    kernels = content["kernels"]
    lines = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in kernels.items()]
    head = f'{{"compiler": {json.dumps(content["compiler"])}, "kernels": {{'
    return "\n".join([head, ",\n".join(lines), "}}"]) + "\n"


def difference(expected: dict, actual: dict) -> str:
    return "".join(
        difflib.unified_diff(
            as_text(expected).splitlines(True),
            as_text(actual).splitlines(True),
            "stored",
            "built",
            n=0,
        )
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write the stored table")
    parser.add_argument("--library", type=Path, default=LIBRARY)
    arguments = parser.parse_args()
    try:
        actual = table(arguments.library)
    except ToolsMissing as error:
        print(f"sass_stats: {error}", file=sys.stderr)
        return 1
    if arguments.update:
        EXPECTED.write_text(as_text(actual))
        print(f"sass_stats: {len(actual['kernels'])} kernels written to {EXPECTED.name}")
        return 0
    diff = difference(json.loads(EXPECTED.read_text()), actual)
    print(
        diff or f"sass_stats: {len(actual['kernels'])} kernels as stored", end="" if diff else "\n"
    )
    return 1 if diff else 0


if __name__ == "__main__":
    sys.exit(main())
