# SPDX-License-Identifier: Apache-2.0
"""A short run of the demo, the self-test and the benchmark, as a user starts them."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def module(*arguments, cwd):
    environment = os.environ | {"PYTHONPATH": str(ROOT / "python"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=500,
    )


def test_demo(tmp_path):
    pytest.importorskip("transformers", minversion="5.17")
    pytest.importorskip("matplotlib")
    run = module("sinkattn", "demo", "--steps", "6", "--batch", "2", "--twin", cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("within the tolerance") == 2  # one step, and the loss curves
    assert "eager, weights + 1 ulp" in run.stdout
    assert "4 sink gradients" in run.stdout or "the 4 sink gradients" in run.stdout
    picture = tmp_path / "demo-output" / "training.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in run.stdout


def test_demo_with_packed_documents(tmp_path):
    pytest.importorskip("transformers", minversion="5.17")
    pytest.importorskip("matplotlib")
    run = module("sinkattn", "demo", "--steps", "12", "--batch", "2", "--packed", cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("within the tolerance") == 2


def test_info_and_check(tmp_path):
    info = module("sinkattn", "info", cwd=tmp_path)
    assert info.returncode == 0, info.stderr
    assert "CPU tensors: yes" in info.stdout
    check = module("sinkattn", "check", cwd=tmp_path)
    assert check.returncode == 0, check.stdout + check.stderr
    assert "all good" in check.stdout
    assert module("sinkattn", "nonsense", cwd=tmp_path).returncode == 2


def test_benchmark(tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "run"
    run = module(
        "sinkattn.bench", "--device", "cpu", "--repeats", "1", "--filter", "bfloat16",
        "--providers", "sinkattn,eager", "--out", str(out), cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    with out.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(r["provider"], r["direction"]) for r in rows} == {
        (p, d) for p in ("sinkattn", "eager") for d in ("fwd", "bwd")
    }
    assert all(float(r["error"]) < 1e-2 and float(r["ms"]) > 0 for r in rows)
    assert out.with_suffix(".png").exists()
