# SPDX-License-Identifier: Apache-2.0
"""The direct entry: plain dense calls past torch's dispatcher, where Python and torch offer what it
needs. The operators serve every call without it."""

from __future__ import annotations

import ctypes

import torch

from ._ops import native_library


def _questions() -> tuple:
    """What is asked before every direct call, after torch's flag of a running profiler; an answer
    other than 0 or False means that something watches or changes operators in this thread and must
    see this one."""
    return (
        torch._C._len_torch_dispatch_stack,
        torch._C._len_torch_function_stack,
        torch._C._are_functorch_transforms_active,
        torch._C._is_tracing,
    )


def _load() -> tuple:
    """(module, None), or (None, the reason why there is none)."""
    try:
        from .lib import _direct
    except ImportError as error:
        return None, f"the module is missing or not for this Python ({error})"
    try:
        guards = torch._C._dynamo.guards  # what Inductor's code allocates with
        _direct.setup(
            ctypes.cast(native_library.sinkattn_direct, ctypes.c_void_p).value,
            torch.Tensor.__dlpack_c_exchange_api__,
            torch.Tensor,
            torch.nn.Parameter,
            torch._C.TensorBase.requires_grad,
            guards._empty_strided_cpu,
            guards._empty_strided_cuda,
            (None, torch.float64, torch.float32, torch.bfloat16, torch.float16),
            vars(torch.autograd.profiler),
            _questions(),
        )
    except (AttributeError, ImportError) as error:
        return None, f"torch {torch.__version__} lacks what it needs ({error})"
    return _direct, None


module, unavailable = _load()


def _nobody(*_arguments) -> None:
    return None


# Takes every argument of flash_attn_func by position; None: not a plain call, take another way.
call = module.call if module else _nobody
