# SPDX-License-Identifier: Apache-2.0
"""Prepares a checkout: everything that `make` needs and the machine does not have.

    python3 tools/bootstrap.py [--groups build test ...] [--offline]

Needs Python 3.11 and its standard library. What it sets up, all inside the checkout:
  .venv/                 virtual environment; sees the outer Python's packages if torch is there
  .venv/cuda-toolkit/    nvcc 13 from wheels, if neither PATH nor /usr/local has one
  .venv/googletest/      GoogleTest from the distribution's package, if it is not installed
  .venv/toolchain.json   what was found, for tools/dev.py
Without network it uses what is there and says what is missing. A second run takes a moment.

Environment: SINKATTN_CUDA=OFF builds without kernels; SINKATTN_TORCH_SPEC replaces the default
requirement for a missing torch (see TORCH_SPEC); CUDACXX names an nvcc.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import site
import subprocess
import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:
    sys.exit(f"bootstrap: expected Python >= 3.11, got {sys.version.split()[0]}")

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
TOOLCHAIN = VENV / "toolchain.json"
STAMP = VENV / "bootstrap.stamp"
CUDA_PREFIX = VENV / "cuda-toolkit"
GTEST_PREFIX = VENV / "googletest"

# Installed only where torch is missing: a version the suite is known to pass with.
TORCH_SPEC = "torch==2.13.0"
CMAKE_MINIMUM = (3, 25)
NVCC_MINIMUM = (13, 0)
NVCC_LIMIT = (14, 0)
DEFAULT_GROUPS = ("build", "test", "sass")


class Missing(Exception):
    """Something that cannot be worked around is not there."""


def say(text: str) -> None:
    print(f"bootstrap: {text}", flush=True)


def warn(title: str, *lines: str) -> None:
    rule = "-" * 78
    print(rule, f"  {title}", *(f"  {line}" for line in lines), rule, sep="\n", flush=True)


def output_of(*command: str | Path) -> str:
    """Standard output of a command, empty if it fails or does not exist."""
    try:
        run = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    except OSError:
        return ""
    return run.stdout if run.returncode == 0 else ""


def version_in(text: str, pattern: str) -> tuple[int, ...] | None:
    match = re.search(pattern, text)
    return tuple(int(part) for part in match.group(1).split(".")) if match else None


# --- virtual environment ------------------------------------------------------------------------


def outer_has_torch() -> bool:
    probe = "import importlib.util as u; print(u.find_spec('torch') is not None)"
    return output_of(sys.executable, "-c", probe).strip() == "True"


def make_venv() -> None:
    if PYTHON.exists() and output_of(PYTHON, "-c", "print(1)"):
        return
    if Path(sys.prefix).resolve() == VENV.resolve():
        raise Missing("run bootstrap.py with a Python from outside .venv")
    inherit = outer_has_torch()
    say(f"creating .venv{' on top of the packages of ' + sys.executable if inherit else ''}")
    command = [sys.executable, "-m", "venv", "--clear", str(VENV)]
    if inherit:
        command.append("--system-site-packages")
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:  # a distribution's Python without ensurepip
        subprocess.run([*command, "--without-pip"], check=True)
    if inherit and sys.prefix != sys.base_prefix:
        # The outer Python is itself a virtual environment, which --system-site-packages skips.
        inner = output_of(PYTHON, "-c", "import site; print(site.getsitepackages()[0])").strip()
        Path(inner, "outer_environment.pth").write_text("\n".join(site.getsitepackages()) + "\n")


def installed() -> dict[str, str]:
    """Distributions visible in the virtual environment, normalised name -> version."""
    probe = (
        "import importlib.metadata as m, json, re\n"
        "print(json.dumps({re.sub('[-_.]+', '-', d.name).lower(): d.version"
        " for d in m.distributions() if d.name}))"
    )
    return json.loads(output_of(PYTHON, "-c", probe) or "{}")


def normalised(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement).group(0)).lower()


def satisfied(requirement: str, have: dict[str, str]) -> bool:
    """Whether a requirement of pyproject.toml (a name with >= or == at most) is met."""
    version = have.get(normalised(requirement))
    if version is None:
        return False
    if "==" in requirement:
        return version.split("+")[0] == requirement.split("==")[1]
    if ">=" in requirement:
        wanted = version_in(requirement, r">=([\d.]+)")
        return (version_in(version, r"^(\d+(?:\.\d+)*)") or ()) >= wanted
    return True


def pip_install(requirements: list[str], *options: str, offline: bool) -> bool:
    """Installs and reports success; never raises for a missing network."""
    if offline:
        return False
    if not output_of(PYTHON, "-m", "pip", "--version"):
        subprocess.run([str(PYTHON), "-m", "ensurepip", "-q"], capture_output=True)
    say("installing " + " ".join(requirements))
    command = [str(PYTHON), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    run = subprocess.run(
        [*command, "--retries", "1", *options, *requirements], capture_output=True, text=True
    )
    if run.returncode != 0:
        say((run.stderr.strip().splitlines() or ["pip failed"])[-1])
    return run.returncode == 0


def install_groups(groups: list[str], offline: bool) -> list[str]:
    """Installs what is missing from the dependency groups; returns what stayed missing."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    wanted = list(dict.fromkeys(r for group in groups for r in declared[group]))
    have = installed()
    if "torch" not in have and ("test" in groups or "demo" in groups or "build" in groups):
        wanted.insert(0, os.environ.get("SINKATTN_TORCH_SPEC", TORCH_SPEC))
    missing = [r for r in wanted if not satisfied(r, have)]
    if not missing:
        return []
    if not pip_install(missing, offline=offline) and len(missing) > 1:
        # One at a time, so that a package that cannot be had does not cost the others; the first
        # two failing both means that there is no network.
        failures = [not pip_install([r], offline=offline) for r in missing[:2]]
        for requirement in missing[2:] if not all(failures) else []:
            pip_install([requirement], offline=offline)
    have = installed()
    return [r for r in missing if not satisfied(r, have)]


# --- build tools --------------------------------------------------------------------------------


def find_or_install(program: str, pattern: str, minimum: tuple[int, ...], offline: bool) -> str:
    """Path of a build tool: the system's if new enough, else the wheel of the same name."""
    candidates = [shutil.which(program), str(VENV / "bin" / program)]
    for attempt in range(2):
        for candidate in filter(None, candidates):
            version = version_in(output_of(candidate, "--version"), pattern)
            if version is not None and version >= minimum:
                return candidate
        if attempt == 0 and not pip_install([program], offline=offline):
            break
    wanted = ".".join(map(str, minimum))
    raise Missing(f"{program} >= {wanted} is neither installed nor could be fetched")


def nvcc_version(nvcc: str | Path) -> tuple[int, ...] | None:
    version = version_in(output_of(nvcc, "--version"), r"\bV(\d+\.\d+\.\d+)")
    return version if version and NVCC_MINIMUM <= version < NVCC_LIMIT else None


def system_nvcc() -> str | None:
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    candidates += sorted(map(str, Path("/usr/local").glob("cuda-13*/bin/nvcc")), reverse=True)
    return next((c for c in candidates if c and nvcc_version(c)), None)


def wheel_nvcc(offline: bool) -> str | None:
    """nvcc from wheels, with the two links that CMake's search for the toolkit expects."""
    root = CUDA_PREFIX / "nvidia" / "cu13"
    nvcc = root / "bin" / "nvcc"
    if not nvcc_version(nvcc):
        declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
        target = ["--no-deps", "--upgrade", "--target", str(CUDA_PREFIX)]
        if not pip_install(declared["cuda-toolkit"], *target, offline=offline):
            return None
    for link, target in ((root / "lib64", "lib"), (root / "lib/libcudart.so", "libcudart.so.13")):
        if not link.is_symlink() and not link.exists():
            link.symlink_to(target)
    for program in (root / "bin").iterdir():
        program.chmod(program.stat().st_mode | 0o111)
    return str(nvcc) if nvcc_version(nvcc) else None


def kernels_wanted() -> bool:
    return os.environ.get("SINKATTN_CUDA", "").upper() not in ("OFF", "0", "NO", "FALSE")


def find_nvcc(offline: bool) -> str | None:
    if not kernels_wanted():
        warn("CPU-ONLY BUILD", "SINKATTN_CUDA=OFF: no Hopper kernels will be built.")
        return None
    nvcc = system_nvcc() or wheel_nvcc(offline)
    if nvcc is None:
        warn(
            "CPU-ONLY BUILD",
            "No nvcc 13 in CUDACXX, PATH or /usr/local, and its wheels could not be fetched.",
            "The library will run on CPU tensors alone; CUDA tensors will raise.",
        )
    return nvcc


def find_googletest(cmake: str, offline: bool) -> str | None:
    """Prefix of GoogleTest for CMake: "" if the system has it, None if it is not to be had."""
    probe = VENV / "find-googletest"
    probe.mkdir(exist_ok=True)
    (probe / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\nproject(probe LANGUAGES CXX)\n"
        "find_package(GTest CONFIG REQUIRED)\n"
    )
    if output_of(cmake, "-S", probe, "-B", probe / "build"):
        return ""
    if not any(GTEST_PREFIX.glob("usr/include/gtest/gtest.h")):
        if offline or not shutil.which("apt-get"):
            return None
        GTEST_PREFIX.mkdir(exist_ok=True)
        download = ["apt-get", "-q", "download", "libgtest-dev"]
        if subprocess.run(download, cwd=GTEST_PREFIX, capture_output=True).returncode != 0:
            subprocess.run(["apt-get", "-q", "update"], capture_output=True)
            subprocess.run(download, cwd=GTEST_PREFIX, capture_output=True)
        for package in GTEST_PREFIX.glob("*.deb"):
            subprocess.run(["dpkg", "-x", str(package), str(GTEST_PREFIX)], check=False)
    found = any(GTEST_PREFIX.glob("usr/include/gtest/gtest.h"))
    return str(GTEST_PREFIX / "usr") if found else None


# --- entry --------------------------------------------------------------------------------------


def fingerprint(groups: list[str]) -> str:
    """Changes whenever an earlier result may no longer hold."""
    digest = hashlib.sha256()
    for part in (
        Path(__file__).read_bytes(),
        (ROOT / "pyproject.toml").read_bytes(),
        os.environ.get("SINKATTN_CUDA", "").encode(),
        os.environ.get("CUDACXX", "").encode(),
        (shutil.which("nvcc") or "").encode(),
        (shutil.which("cmake") or "").encode(),
    ):
        digest.update(hashlib.sha256(part).digest())
    return json.dumps({"inputs": digest.hexdigest(), "groups": sorted(groups)})


def up_to_date(groups: list[str]) -> bool:
    if not (PYTHON.exists() and STAMP.exists() and TOOLCHAIN.exists()):
        return False
    done, wanted = json.loads(STAMP.read_text()), json.loads(fingerprint(groups))
    return done["inputs"] == wanted["inputs"] and set(wanted["groups"]) <= set(done["groups"])


def bootstrap(groups: list[str], offline: bool) -> None:
    if up_to_date(groups):
        return
    if STAMP.exists():  # keep what an earlier run with other groups already provided
        groups = sorted(set(groups) | set(json.loads(STAMP.read_text())["groups"]))
        STAMP.unlink()
    make_venv()
    missing = install_groups(groups, offline)
    cmake = find_or_install("cmake", r"version (\d+\.\d+)", CMAKE_MINIMUM, offline)
    toolchain = {
        "cmake": cmake,
        "ninja": find_or_install("ninja", r"^(\d+\.\d+)", (1, 10), offline),
        "nvcc": find_nvcc(offline),
        "googletest": find_googletest(cmake, offline),
        "missing": missing,
    }
    TOOLCHAIN.write_text(json.dumps(toolchain, indent=2) + "\n")
    if toolchain["googletest"] is None:
        warn("C++ TESTS ARE LEFT OUT", "GoogleTest (libgtest-dev) is not installed or fetchable.")
    if missing:
        warn("MISSING PACKAGES", *missing, "What needs them is skipped or fails with that reason.")
        if any(normalised(r) == "torch" for r in missing):
            raise Missing("torch >= 2.10 is not installed and could not be fetched")
    # What could not be had is looked for again next time: a network may have come back.
    complete = not missing and toolchain["googletest"] is not None
    if complete and (toolchain["nvcc"] is not None or not kernels_wanted()):
        STAMP.write_text(fingerprint(groups))
    say(f"ready: nvcc {toolchain['nvcc'] or 'none'}, cmake {cmake}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", nargs="+", default=list(DEFAULT_GROUPS))
    parser.add_argument("--offline", action="store_true", help="never try the network")
    arguments = parser.parse_args()
    try:
        bootstrap(arguments.groups, arguments.offline)
    except Missing as error:
        print(f"bootstrap: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
