# SPDX-License-Identifier: Apache-2.0
"""What is shipped: operator library, wheel, machine code, and the C++ side's own tests."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"
LIBRARY = ROOT / "python" / "sinkattn" / "lib" / "libsinkattn_torch.so"
SYSTEM_LIBRARIES = {"libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6"}
LOADER = re.compile(r"^ld-linux-.*\.so\.\d$")
WHEEL_LIMIT = 20 * 2**20
# What the documented platforms have: Debian 12, Ubuntu 22.04, RHEL 9 and newer.
GLIBC_CEILING = (2, 34)
GLIBCXX_CEILING = (3, 4, 30)

sys.path.insert(0, str(TOOLS))
audit = pytest.importorskip("audit", reason="tools/ is not beside the tests")
import nvcc_guard  # noqa: E402
import sanitize  # noqa: E402
import sass_stats  # noqa: E402


@pytest.fixture(scope="module")
def library() -> Path:
    assert LIBRARY.exists(), f"{LIBRARY} is not built: run `make build`"
    return LIBRARY


@pytest.fixture(scope="module")
def has_kernels(library) -> bool:
    return b".nv_fatbin" in library.read_bytes()


# --- the operator library -----------------------------------------------------------------------


def test_needed_libraries(library):
    needed = audit.needed(library)
    assert "libtorch.so" in needed, "the CUDA stream could not be found without it"
    foreign = needed - SYSTEM_LIBRARIES - {"libtorch.so"}
    assert {name for name in foreign if not LOADER.match(name)} == set()


def test_no_search_path_and_no_executable_stack(library):
    assert audit.search_paths(library) == []
    assert not audit.has_executable_stack(library)


def test_only_stable_torch_symbols(library):
    assert audit.unstable_symbols(library) == []
    shims = [s.name for s in audit.symbols(library) if audit.STABLE_SHIM.match(s.name)]
    assert len(shims) > 5, "the audit no longer sees torch's functions"


def test_hidden_symbols(library):
    offered = [s.name for s in audit.symbols(library) if s.defined]
    ours = {name for name in offered if "sinkattn" in name or name.startswith("cuda")}
    # What build_info() asks, and the table of the direct entry.
    assert ours == {"sinkattn_version", "sinkattn_built_with_cuda", "sinkattn_direct"}


def test_python_module():
    """The module of the direct entry binds to Python's C functions alone, whatever the version."""
    module = LIBRARY.with_name("_direct.abi3.so")
    if not module.exists():
        pytest.skip("built without Python.h")
    assert {n for n in audit.needed(module) - SYSTEM_LIBRARIES if not LOADER.match(n)} == set()
    assert audit.search_paths(module) == []
    assert not audit.has_executable_stack(module)
    foreign = audit.unstable_symbols(module)
    assert "PyModule_Create2" in foreign
    assert [name for name in foreign if not re.match(r"_?Py", name)] == []
    offered = {s.name for s in audit.symbols(module) if s.defined}
    assert offered - {"_init", "_fini"} == {"PyInit__direct"}
    assert audit.version_floor(module, "GLIBC") <= audit.version_floor(LIBRARY, "GLIBC")


def test_instruction_sets_stay_apart():
    """A file compiled for AVX offers its one entry and nothing a linker could take for baseline.

    A template or inline function that two files share is kept once: if the copy with AVX-512 wins,
    the library crashes on processors without it.
    """
    objects = [
        path
        for path in (ROOT / "build" / "release").rglob("src/cpu/*.o")
        if re.search(r"_avx\w+\.cpp\.o$", path.name)
    ]
    if not objects:
        pytest.skip("no build/release: run `make build`")
    for path in objects:
        listing = subprocess.run(
            ["nm", "--defined-only", "--extern-only", str(path)],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        assert len(listing.splitlines()) == 1, f"{path.name}:\n{listing}"


def test_platform_floor(library):
    assert audit.version_floor(library, "GLIBCXX") <= GLIBCXX_CEILING
    if audit.version_floor(library, "GLIBC") > GLIBC_CEILING:
        pytest.skip("built on a distribution newer than the documented floor")


def test_audit_sees_violations(tmp_path):
    """The rules above can fail: a library that breaks all of them is reported as such."""
    source = tmp_path / "bad.cpp"
    source.write_text("namespace c10 { int foreign(); }\nint f() { return c10::foreign(); }\n")
    bad = tmp_path / "bad.so"
    flags = ["-shared", "-fPIC", "-Wl,-z,execstack", "-Wl,-rpath,/nowhere"]
    compiler = shutil.which("g++") or pytest.skip("g++ is not installed")
    subprocess.run([compiler, *flags, str(source), "-o", str(bad)], check=True)
    assert audit.unstable_symbols(bad) == ["_ZN3c107foreignEv"]
    assert audit.search_paths(bad) == ["/nowhere"]
    assert audit.has_executable_stack(bad)
    assert "libtorch.so" not in audit.needed(bad)


def test_import_touches_nothing(library):
    """No file is written, no process started and no socket opened by `import sinkattn`."""
    program = (
        "import sys, torch\n"
        "seen = []\n"
        "def hook(event, args):\n"
        "    write = event == 'open' and set(str(args[1] or 'r')) & set('wax+')\n"
        "    if write or event in ('subprocess.Popen', 'os.system', 'socket.connect'):\n"
        "        seen.append((event, str(args[:2])))\n"
        "sys.addaudithook(hook)\n"
        "sys.dont_write_bytecode = True\n"
        "import sinkattn\n"
        "assert not seen, seen\n"
    )
    env = dict(os.environ, PYTHONPATH=str(ROOT / "python"))
    run = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr


# --- machine code -------------------------------------------------------------------------------


def test_kernel_statistics(library, has_kernels):
    """Instruction counts, registers and shared memory of every kernel are as stored."""
    if not has_kernels:
        pytest.skip("CPU-only build")
    try:
        actual = sass_stats.table(library)
    except sass_stats.ToolsMissing as error:
        pytest.skip(str(error))
    expected = json.loads(sass_stats.EXPECTED.read_text())
    if actual["compiler"] != expected["compiler"]:
        pytest.skip(f"stored for {expected['compiler']}, built with {actual['compiler']}")
    diff = sass_stats.difference(expected, actual)
    assert not diff, f"run tools/sass_stats.py --update if this is intended\n{diff}"


def test_generated_instructions_are_current():
    command = [sys.executable, ROOT / "tools" / "generate_wgmma.py", "--check"]
    assert subprocess.run(command, check=False).returncode == 0


def test_no_kernel_spills(library, has_kernels):
    if not has_kernels:
        pytest.skip("CPU-only build")
    try:
        kernels = sass_stats.kernel_statistics(library)
    except sass_stats.ToolsMissing as error:
        pytest.skip(str(error))
    assert kernels
    assert [n for n, row in kernels.items() if row["stack"] or row.get("local")] == []


_SPILL_LOG = """\
ptxas info    : Compiling entry function 'kernel' for 'sm_90a'
ptxas info    : Function properties for kernel
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
"""


@pytest.mark.parametrize(
    "log",
    [
        _SPILL_LOG.format(stack=8, stores=0, loads=0),
        _SPILL_LOG.format(stack=0, stores=4, loads=4),
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are"
        " serialized due to insufficient register resources for the wgmma pipeline in the function",
        "ptxas info    : (C7519) wait instruction was injected",
        "ptxas info    : setmaxnreg ignored to maintain minimum register requirements.",
    ],
)
def test_guard_rejects(log):
    assert len(nvcc_guard.findings(log)) == 1


def test_guard_accepts_clean_log():
    assert nvcc_guard.findings(_SPILL_LOG.format(stack=0, stores=0, loads=0)) == []


_LOCAL_MEMORY = """\
__global__ void kernel(float* x, int n) {
  float a[64];
  for (int i = 0; i < 64; ++i) a[i] = x[i] * x[i + 1];
  for (int i = 0; i < 64; ++i) a[(i * n) & 63] += 1;
  x[n] = a[n];
}
"""
# An accumulator is changed while the wgmma that owns it may still be running.
_SERIALISED_WGMMA = """\
__global__ void kernel(float* out, unsigned long long a, unsigned long long b) {
  float c[4] = {};
  asm volatile("wgmma.fence.sync.aligned;");
  for (int i = 0; i < 2; ++i) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0,%1,%2,%3}, %4, %5, 1, 1, 1, 0, 0;"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "l"(a), "l"(b));
    c[0] *= 2;
  }
  asm volatile("wgmma.commit_group.sync.aligned;");
  asm volatile("wgmma.wait_group.sync.aligned 0;");
  out[threadIdx.x] = c[0] + c[1] + c[2] + c[3];
}
"""
_CLEAN = "__global__ void kernel(float* x) { x[threadIdx.x] *= 2; }\n"


@pytest.mark.parametrize(
    "source, complaint",
    [(_LOCAL_MEMORY, "bytes stack frame"), (_SERIALISED_WGMMA, "serialized"), (_CLEAN, None)],
    ids=["local memory", "serialised wgmma", "clean"],
)
def test_guard_stops_the_compiler(tmp_path, source, complaint):
    """With the real compiler: a slow kernel fails the build and leaves no object behind."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on this machine")
    file, target = tmp_path / "kernel.cu", tmp_path / "kernel.o"
    file.write_text(source)
    flags = ["-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-v"]
    guard = [sys.executable, str(TOOLS / "nvcc_guard.py")]
    command = [*guard, nvcc, *flags, "-c", str(file), "-o", str(target)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "Compiling entry function" in Path(f"{target}.ptxas.log").read_text()
    assert target.exists() == (complaint is None)
    assert (run.returncode == 0) == (complaint is None)
    assert complaint is None or complaint in run.stderr


# --- the wheel ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel() -> Path:
    wheels = sorted((ROOT / "dist").glob("sinkattn-*.whl"))
    if not wheels:
        pytest.skip("no wheel in dist/: run `make wheel`")
    assert len(wheels) == 1, f"expected one wheel in dist/, got {wheels}"
    return wheels[0]


def test_wheel_size(wheel):
    assert wheel.stat().st_size <= WHEEL_LIMIT


def test_wheel_tag(wheel, library):
    """One wheel for every Python, since each works without the module that is for some of them;
    the platform is what the machine code really needs."""
    python, abi, platform = wheel.stem.split("-")[-3:]
    assert (python, abi) == ("py3", "none")
    assert platform == audit.platform_tag(library)


def test_wheel_contents(wheel, has_kernels):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        shipped = archive.read("sinkattn/lib/libsinkattn_torch.so")
        module = LIBRARY.with_name("_direct.abi3.so")
        assert f"sinkattn/lib/{module.name}" in names or not module.exists()
        (bill,) = (json.loads(archive.read(n)) for n in names if n.endswith(".cdx.json"))
    for wanted in (
        "sinkattn/__init__.py",
        "sinkattn/include/sinkattn/attention.h",
        "sinkattn/lib/cmake/sinkattn/sinkattnConfig.cmake",
    ):
        assert wanted in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert any(re.match(r"sinkattn/lib/libsinkattn\.so", name) for name in names)
    foreign = re.compile(r"\.(pkl|pickle|pyc|a|o|cu|cpp)$|/tests?/")
    assert [name for name in names if foreign.search(name)] == []
    assert [c["name"] for c in bill["components"]] == (["cudart_static"] if has_kernels else [])
    assert shipped == LIBRARY.read_bytes(), "the wheel carries another build than was tested"


def test_wheel_runs_from_path(wheel, tmp_path):
    """Unzipped onto PYTHONPATH, away from the checkout, the wheel computes."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    program = (
        "import sinkattn, torch\n"
        "q = torch.randn(1, 3, 2, 8)\n"
        "out = sinkattn.flash_attn_func(q, q, q, causal=True, learnable_sink=torch.zeros(2))\n"
        "assert out.shape == q.shape and bool(out.isfinite().all())\n"
        "print(sinkattn.__file__)\n"
    )
    env = dict(os.environ, PYTHONPATH=str(tmp_path / "site"))
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(str(tmp_path))


_CONSUMER = """\
cmake_minimum_required(VERSION 3.25)
project(consumer LANGUAGES CXX)
find_package(sinkattn REQUIRED)
add_executable(consumer main.cpp)
target_link_libraries(consumer PRIVATE sinkattn::sinkattn)
"""
_CONSUMER_MAIN = """\
#include <cstdio>
#include <sinkattn/attention.h>
int main() { std::printf("%s %d", sinkattn::version(), sinkattn::built_with_cuda()); }
"""


def test_wheel_serves_cpp_programs(wheel, tmp_path, has_kernels):
    """find_package(sinkattn) against the unzipped wheel gives a program that builds and runs."""
    cmake = shutil.which("cmake") or pytest.skip("cmake is not installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "CMakeLists.txt").write_text(_CONSUMER)
    (tmp_path / "main.cpp").write_text(_CONSUMER_MAIN)
    prefix = f"-DCMAKE_PREFIX_PATH={tmp_path / 'site' / 'sinkattn'}"
    build = str(tmp_path / "build")
    for command in ([cmake, "-S", str(tmp_path), "-B", build, prefix], [cmake, "--build", build]):
        run = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stdout + run.stderr
    run = subprocess.run([f"{build}/consumer"], capture_output=True, text=True, timeout=60)
    version = re.search(r"sinkattn-([\d.]+)-", wheel.name).group(1)
    assert run.stdout == f"{version} {int(has_kernels)}"


# --- compute-sanitizer ---------------------------------------------------------------------------


def test_sanitizer_grid_is_valid(library):
    """Every case of the reduced grid is a legal call: on CPU tensors all of them run."""
    run = subprocess.run(
        [sys.executable, TOOLS / "sanitize.py", "--grid", "cpu"],
        capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT / "python"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"^grid: \d{3} cases ran, 0 are not built$", run.stdout, re.M)


@pytest.mark.parametrize(
    ("status", "lines", "clean"),
    [
        (0, ["grid: 9 cases ran, 2 are not built", "========= ERROR SUMMARY: 0 errors"], True),
        (86, ["grid: 9 cases ran, 2 are not built", "========= ERROR SUMMARY: 3 errors"], False),
        (2, ["no Hopper GPU: none", "========= ERROR SUMMARY: 0 errors"], False),
        (0, ["========= ERROR SUMMARY: 0 errors"], False),  # died before the grid's last line
        (0, ["grid: 9 cases ran, 2 are not built"], False),  # not a sanitizer
    ],
)
def test_sanitizer_verdict(tmp_path, monkeypatch, status, lines, clean):
    program = tmp_path / "compute-sanitizer"
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{x}'\n" for x in lines) + f"exit {status}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sanitize, "LOGS", tmp_path)
    assert sanitize.run(str(program), "memcheck") == clean


# --- the C++ side -------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["cpp_tests", "sanitized_cpp_tests", "fuzz_smoke", "wheel"])
def test_stage(stage):
    """Stages that `make test` ran before this suite, so that the closing line counts them."""
    record = os.environ.get("SINKATTN_STAGES")
    if record is None:
        pytest.skip("run by `make test`")
    result = json.loads(Path(record).read_text())[stage]
    assert result["ok"], result["detail"]
    if result["detail"].startswith("skipped"):
        pytest.skip(result["detail"])
