# SPDX-License-Identifier: Apache-2.0
"""The machine a benchmark ran on: device, driver, commit, clocks, power, measured ceilings."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .timing import copy_rate, matmul_rate

QUERY = "clocks.sm,clocks.max.sm,power.draw,power.limit,temperature.gpu,clocks_event_reasons.active"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def commit_of_checkout() -> str:
    """Short commit of the source tree this file lies in, with `+` for local changes.

    SINKATTN_COMMIT names it where the tree travels without its history.
    """
    named = os.environ.get("SINKATTN_COMMIT")
    if named:
        return named
    here = str(Path(__file__).parent)
    commit = _output("git", "-C", here, "rev-parse", "--short=12", "HEAD")
    dirty = _output("git", "-C", here, "status", "--porcelain", "--untracked-files=no")
    return (commit or "unknown") + ("+" if dirty else "")


def gpu_state(index: int) -> dict[str, str]:
    """SM clock, power, temperature and throttle reasons as nvidia-smi reports them right now."""
    text = _output("nvidia-smi", f"--id={index}", f"--query-gpu={QUERY}", "--format=csv,noheader")
    return dict(zip(QUERY.split(","), (part.strip() for part in text.split(",")), strict=False))


@dataclass
class Environment:
    """Facts that every recorded row or its side file carries."""

    device: torch.device
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())
    gpu: str = ""
    driver: str = ""
    commit: str = field(default_factory=commit_of_checkout)
    copy_bytes_per_second: float = 0.0
    matmul_flops: float = 0.0
    states: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def measure(cls, device: torch.device) -> Environment:
        environment = cls(device)
        if device.type == "cuda":
            environment.gpu = torch.cuda.get_device_name(device)
            environment.driver = _output(
                "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
            ).splitlines()[0]
            environment.matmul_flops = matmul_rate(device)
        else:
            environment.gpu = f"{_cpu_name()} ({torch.get_num_threads()} threads)"
        environment.copy_bytes_per_second = copy_rate(device)
        environment.log_state()
        return environment

    def log_state(self) -> None:
        """Remembers clocks and power; call it between cases."""
        if self.device.type == "cuda":
            self.states.append(gpu_state(self.device.index or 0))

    def as_dict(self) -> dict[str, object]:
        return {
            "date": self.date,
            "gpu": self.gpu,
            "driver": self.driver,
            "commit": self.commit,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            "copy_gb_per_s": round(self.copy_bytes_per_second / 1e9, 1),
            "matmul_tflops": round(self.matmul_flops / 1e12, 1),
            "gpu_states": self.states,
        }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "CPU"
