# SPDX-License-Identifier: Apache-2.0
"""The direct entry: plain dense calls past torch's dispatcher, where this interpreter and this torch
offer what it needs. The operators serve every call without it."""

from __future__ import annotations

import ctypes
import weakref

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


def _adopt_copies(aoti) -> bool:
    """Whether torch's function that makes a tensor of a handle leaves the handle alive. It does, in
    spite of its name; whoever believes the name leaks every tensor."""
    tensor = torch.empty(0)
    alive = weakref.ref(tensor)
    handle = aoti.unsafe_alloc_void_ptr_from_tensor(tensor)
    same = aoti.alloc_tensor_by_stealing_from_void_ptr(handle)
    del tensor, same
    if alive() is None:
        return False
    aoti.alloc_tensors_by_stealing_from_void_ptrs([handle])
    return True


def _load() -> tuple:
    """(module, None), or (None, the reason why there is none)."""
    try:
        from .lib import _direct
    except ImportError as error:
        return None, f"the module is missing or not for this Python ({error})"
    try:
        aoti = torch._C._aoti
        _direct.setup(
            ctypes.cast(native_library.sinkattn_direct, ctypes.c_void_p).value,
            torch.Tensor.__dlpack_c_exchange_api__,
            torch.Tensor,
            torch.nn.Parameter,
            torch._C.TensorBase.requires_grad,
            aoti.alloc_tensor_by_stealing_from_void_ptr,
            _adopt_copies(aoti),
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
