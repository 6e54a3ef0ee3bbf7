# SPDX-License-Identifier: Apache-2.0
"""What is installed, what it can do here, and what a call would run."""

from __future__ import annotations

import torch

from . import _direct
from ._execute import Explained, explaining
from ._ops import LIBRARY, built_with_cuda, version


def unavailable_reason(device=None) -> str | None:
    """Why the Hopper kernels cannot run on `device` (default: the current CUDA device), or None."""
    if not built_with_cuda():
        return "this build has no CUDA kernels"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    target = torch.device("cuda" if device is None else device)
    if target.type != "cuda":
        return f"{target} is not a CUDA device"
    major, minor = torch.cuda.get_device_capability(target)
    if (major, minor) != (9, 0):
        return (
            f"{torch.cuda.get_device_name(target)} has compute capability {major}.{minor}, not 9.0"
        )
    return None


def is_available(device=None) -> bool:
    """Whether the Hopper kernels can run on `device` (default: the current CUDA device).

    CPU tensors work regardless.
    """
    return unavailable_reason(device) is None


def build_info() -> dict:
    """Version, kernels, library path, torch, and why CUDA and the direct entry, which saves plain
    calls host time, are not usable here (None if they are)."""
    return {
        "version": version(),
        "cuda_kernels": built_with_cuda(),
        "library": str(LIBRARY),
        "torch": torch.__version__,
        "cuda_unavailable": unavailable_reason(),
        "direct_unavailable": _direct.unavailable,
    }


def explain(function, *args, **kwargs) -> str:
    """The plan of a call as text: kernel, tiles, splits, workspace bytes and the reason.

    Args: function, a public attention function, and its args and kwargs. Nothing is computed;
    arguments are checked as in the call itself. With new keys for a cache, the plan is that of the
    attention after the append.
    """
    with explaining(), torch.no_grad():
        try:
            function(*args, **kwargs)
        except Explained as result:
            return str(result)
    raise TypeError(
        "function: expected an attention function of sinkattn, got "
        f"{getattr(function, '__name__', function)!r}"
    )
