# SPDX-License-Identifier: Apache-2.0
"""Arguments of the public functions as the operators want them. What only C++ can know is checked
there; this module handles what exists in Python alone: names, None, tuples, 0-d tensors."""

from __future__ import annotations

import torch


def tensor(value, name: str) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    return value


def optional_tensor(value, name: str) -> torch.Tensor | None:
    return value if value is None else tensor(value, name)


def one_sink(s_aux, sinks, learnable_sink) -> torch.Tensor | None:
    """The sink under whichever of its three names it came; two of them are a TypeError."""
    if s_aux is None and sinks is None:
        return None if learnable_sink is None else tensor(learnable_sink, "learnable_sink")
    given = None
    name = ""
    for candidate, value in (
        ("learnable_sink", learnable_sink),
        ("s_aux", s_aux),
        ("sinks", sinks),
    ):
        if value is None:
            continue
        if given is not None:
            raise TypeError(f"{candidate}: expected one name for the sink, got {name} as well")
        given, name = tensor(value, candidate), candidate
    return given


def integer(value, name: str) -> int:
    """An int; 0-d tensors are read (a synchronisation on CUDA). Booleans are not integers here."""
    if type(value) is int:
        return value
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or value.is_floating_point():
            raise TypeError(f"{name}: expected an integer, got a tensor of {value.dtype}")
        return value.item()
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    return value


def optional_integer(value, name: str) -> int | None:
    return None if value is None else integer(value, name)


def window(window_size) -> tuple[int, int]:
    """(left, right) inclusive counts; None and negative sides are unlimited (-1)."""
    if window_size is None:
        return -1, -1
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(f"window_size: expected (left, right) or None, got {window_size!r}")
    left, right = (-1 if side is None else integer(side, "window_size") for side in window_size)
    return (left if left >= 0 else -1), (right if right >= 0 else -1)


def number(value, name: str) -> float:
    if type(value) is float:
        return value
    if isinstance(value, (bool, torch.Tensor)) or not isinstance(
        value, (int, float, torch.SymInt, torch.SymFloat)
    ):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    return float(value)


def boolean(value, name: str) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    return value


def wants_gradient(*tensors) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def refuse_gradient(feature: str) -> None:
    raise NotImplementedError(
        f"{feature}: expected no input that requires grad (forward only), got one; use "
        "torch.no_grad() or call without this option"
    )
