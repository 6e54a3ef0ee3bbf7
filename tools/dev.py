# SPDX-License-Identifier: Apache-2.0
"""The make targets, one function each. Runs inside the virtual environment of tools/bootstrap.py.

python tools/dev.py build | test | wheel | demo | bench | lint | format
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import audit

ROOT = Path(__file__).resolve().parent.parent
TOOLCHAIN = ROOT / ".venv" / "toolchain.json"
RELEASE = ROOT / "build" / "release"
SANITIZE = ROOT / "build" / "sanitize"
DIST = ROOT / "dist"
LIBRARY = ROOT / "python" / "sinkattn" / "lib" / "libsinkattn_torch.so"

# The compiler's appetite for the largest kernel file; keeps small machines from swapping.
GIB_PER_COMPILE_JOB = 4
FUZZ_RUNS = 20_000


class StageError(Exception):
    """A stage of `make test` failed; the text says how."""


def toolchain() -> dict:
    return json.loads(TOOLCHAIN.read_text())


def run(*command: str | Path, **options) -> None:
    subprocess.run([str(part) for part in command], cwd=ROOT, check=True, **options)


def jobs() -> str:
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return str(max(1, min(os.cpu_count() or 1, int(gib / GIB_PER_COMPILE_JOB))))


def environment() -> dict[str, str]:
    """Environment of CMake runs: the compiler that bootstrap chose, on PATH and by name."""
    tools = toolchain()
    env = dict(os.environ)
    folders = [str(ROOT / ".venv" / "bin")]
    if tools["nvcc"]:
        env["CUDACXX"] = tools["nvcc"]
        folders.append(str(Path(tools["nvcc"]).parent))
    env["PATH"] = os.pathsep.join([*folders, env["PATH"]])
    env["SINKATTN_CUDA"] = "ON" if tools["nvcc"] else "OFF"
    return env


def cached_compiler(folder: Path) -> str | None:
    """The nvcc that a build folder was configured with."""
    cache = folder / "CMakeCache.txt"
    found = (
        re.search(r"^CMAKE_CUDA_COMPILER:\w+=(.+)$", cache.read_text(), re.M)
        if cache.exists()
        else None
    )
    return found.group(1) if found else None


def configure_and_build(folder: Path, *definitions: str, targets: tuple[str, ...] = ()) -> None:
    tools = toolchain()
    options = [
        f"-DCMAKE_MAKE_PROGRAM={tools['ninja']}",
        f"-DPython3_EXECUTABLE={sys.executable}",
        *(f"-D{definition}" for definition in definitions),
    ]
    cached = cached_compiler(folder)
    if cached is not None and cached != tools["nvcc"] and "SINKATTN_SANITIZE=ON" not in definitions:
        options.append("--fresh")  # CMake never looks for a compiler twice
    env = environment()
    run(tools["cmake"], "-S", ROOT, "-B", folder, "-G", "Ninja", *options, env=env)
    wanted = ["--target", *targets] if targets else []
    run(tools["cmake"], "--build", folder, "-j", jobs(), *wanted, env=env)


def build() -> None:
    """The library, the torch operators, the C++ tests and the examples, in build/release."""
    started = time.monotonic()
    cuda = environment()["SINKATTN_CUDA"]
    configure_and_build(
        RELEASE, "CMAKE_BUILD_TYPE=Release", f"SINKATTN_CUDA={cuda}", "SINKATTN_TORCH=ON"
    )
    print(f"build: done in {time.monotonic() - started:.0f} s, CUDA {cuda}", flush=True)


def wheel() -> Path:
    """dist/*.whl from the objects of build/release, tagged with the oldest glibc it runs on."""
    for old in DIST.glob("*.whl"):
        old.unlink()
    settings = [f"-Cbuild-dir={RELEASE}", f"-Ccmake.define.Python3_EXECUTABLE={sys.executable}"]
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "."]
    options = ["--no-deps", "--no-build-isolation", "-w", str(DIST), *settings]
    run(*command, *options, env=environment())
    (built,) = DIST.glob("*.whl")
    tag = ["--remove", "--platform-tag", audit.platform_tag(LIBRARY)]
    run(sys.executable, "-m", "wheel", "tags", *tag, built, stdout=subprocess.DEVNULL)
    (built,) = DIST.glob("*.whl")
    print(f"wheel: {built.relative_to(ROOT)}, {built.stat().st_size / 2**20:.2f} MiB", flush=True)
    return built


# --- make test ----------------------------------------------------------------------------------


def ctest(folder: Path) -> str:
    """Runs the C++ tests and the examples of a build folder; returns ctest's closing sentence."""
    program = Path(toolchain()["cmake"]).with_name("ctest")
    command = [
        program,
        "--test-dir",
        folder,
        "--output-on-failure",
        "-j",
        jobs(),
        "--no-tests=error",
    ]
    result = subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, text=True)
    closing = re.search(r"\d+% tests passed.*out of \d+", result.stdout)
    if result.returncode != 0:
        print(result.stdout[-6000:], result.stderr[-2000:], flush=True)
        raise StageError(closing.group(0) if closing else "ctest failed")
    if toolchain()["googletest"] is None:
        return f"skipped: GoogleTest is not installed; examples: {closing.group(0)}"
    skipped = re.findall(r"(\S+) \(Skipped\)", result.stdout)
    return closing.group(0) + (f"; skipped: {', '.join(skipped)}" if skipped else "")


def cpp_tests() -> str:
    return ctest(RELEASE)


def sanitized_cpp_tests() -> str:
    configure_and_build(
        SANITIZE,
        "CMAKE_BUILD_TYPE=Debug",
        "CMAKE_CXX_FLAGS_DEBUG=-O1",
        "SINKATTN_SANITIZE=ON",
        "SINKATTN_FUZZ=ON",
    )
    return ctest(SANITIZE)


def fuzz_smoke() -> str:
    """Every fuzz target, sanitized, for a fixed number of inputs from a fixed seed."""
    programs = sorted((SANITIZE / "fuzz").glob("fuzz_*"))
    if not programs:
        raise StageError("no fuzz target was built")
    for program in programs:
        run(program, f"-runs={FUZZ_RUNS}", "-seed=1")
    return f"{len(programs)} targets, {FUZZ_RUNS} inputs each"


def wheel_size() -> str:
    for module in ("pip", "wheel", "scikit_build_core"):
        if importlib.util.find_spec(module) is None:
            return f"skipped: {module} is not installed"
    return f"{wheel().stat().st_size} bytes"


STAGES: dict[str, Callable[[], str]] = {
    "cpp_tests": cpp_tests,
    "sanitized_cpp_tests": sanitized_cpp_tests,
    "fuzz_smoke": fuzz_smoke,
    "wheel": wheel_size,
}


def test() -> None:
    """Everything that can be proved on this machine.

    The stages' results are handed to tests/python/test_package.py, so that one closing line, the
    last of the output, counts them all.
    """
    build()
    results = {}
    for name, stage in STAGES.items():
        started = time.monotonic()
        print(f"test: {name} ...", flush=True)
        try:
            results[name] = {"ok": True, "detail": stage()}
        except (StageError, subprocess.CalledProcessError) as error:
            results[name] = {"ok": False, "detail": str(error)}
        seconds = time.monotonic() - started
        state = "ok" if results[name]["ok"] else "FAILED"
        print(f"test: {name} {state}, {results[name]['detail']} ({seconds:.0f} s)", flush=True)
    record = ROOT / "build" / "stages.json"
    record.write_text(json.dumps(results, indent=2) + "\n")
    pytest(record)


def pytest(stages: Path) -> None:
    """One worker per core; on a machine with a GPU a single one, since its memory is shared."""
    if importlib.util.find_spec("pytest") is None:
        sys.exit("test: pytest is not installed and could not be fetched, the suite did NOT run")
    env = environment() | {
        "PYTHONPATH": str(ROOT / "python"),
        "SINKATTN_STAGES": str(stages),
        # The workers share the cores: a thread that waits for its team must not spin.
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    options = ["-m", "pytest", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") and not Path("/dev/nvidiactl").exists():
        options += ["-n", str(os.cpu_count() or 1), "--dist", "worksteal"]
    run(sys.executable, *options, env=env)


# --- the other targets --------------------------------------------------------------------------


def python_module(*arguments: str) -> None:
    build()
    run(sys.executable, "-m", *arguments, env=environment() | {"PYTHONPATH": str(ROOT / "python")})


def demo() -> None:
    python_module("sinkattn", "demo")


def bench() -> None:
    python_module("sinkattn.bench")


def sources(*patterns: str) -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def style(clang_format: list[str], ruff_check: list[str], ruff_format: list[str]) -> None:
    cpp = sources("*.h", "*.inl", "*.cpp", "*.cu", "*.cuh")
    commands = [
        ["clang-format", *clang_format, *cpp],
        ["ruff", "check", *ruff_check],
        ["ruff", "format", *ruff_format],
    ]
    path = environment()["PATH"]
    failed = False
    for name, *rest in commands:
        program = shutil.which(name, path=path)
        if program is None:
            sys.exit(f"{name} is not installed and could not be fetched")
        failed |= subprocess.run([program, *rest], cwd=ROOT).returncode != 0
    if failed:
        sys.exit(1)


def lint() -> None:
    style(["--dry-run", "-Werror"], [], ["--check"])


def format_sources() -> None:
    style(["-i"], ["--fix"], [])


COMMANDS: dict[str, Callable[[], object]] = {
    "build": build,
    "test": test,
    "wheel": lambda: (build(), wheel()),
    "demo": demo,
    "bench": bench,
    "lint": lint,
    "format": format_sources,
}


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in COMMANDS:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        COMMANDS[arguments[0]]()
    except subprocess.CalledProcessError as error:
        return error.returncode if error.returncode > 0 else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
