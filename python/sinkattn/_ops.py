# SPDX-License-Identifier: Apache-2.0
"""The operator library: loading, fake implementations, errors."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch.compiler import is_compiling

LIBRARY = Path(__file__).parent / "lib" / "libsinkattn_torch.so"

if not LIBRARY.exists():
    raise ImportError(
        f"sinkattn: the operator library {LIBRARY} is missing; build it with `make build` in a "
        "source tree, or reinstall the wheel"
    )
torch.ops.load_library(str(LIBRARY))
ops = torch.ops.sinkattn

native_library = ctypes.CDLL(str(LIBRARY))
native_library.sinkattn_version.restype = ctypes.c_char_p


def version() -> str:
    """Version of the compiled library."""
    return native_library.sinkattn_version().decode()


def built_with_cuda() -> bool:
    """Whether the Hopper kernels are in the compiled library."""
    return bool(native_library.sinkattn_built_with_cuda())


_EXCEPTIONS = {
    "TypeError": TypeError,
    "ValueError": ValueError,
    "NotImplementedError": NotImplementedError,
    "RuntimeError": RuntimeError,
}


def call(operator, *arguments, **options):
    """Calls an operator and raises its errors as the Python exceptions they stand for."""
    if is_compiling():
        return operator(*arguments, **options)
    try:
        return operator(*arguments, **options)
    except RuntimeError as error:
        mapped = translate(error)
        if mapped is None:
            raise
    raise mapped


def translate(error: RuntimeError) -> Exception | None:
    """The exception behind "sinkattn: <type>: <text>", or None for any other error."""
    for line in str(error).splitlines():
        start = line.find("sinkattn: ")
        if start < 0:
            continue
        name, _, text = line[start + len("sinkattn: ") :].partition(": ")
        if name in _EXCEPTIONS:
            return _EXCEPTIONS[name](text)
    return None


# --- fake implementations: shapes, dtypes and strides without data -------------------------------


def _statistics_dtype(q):
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _fake_lse(q):
    if q.dim() == 3:
        return q.new_empty((q.shape[1], q.shape[0]), dtype=_statistics_dtype(q))
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=_statistics_dtype(q))


@torch.library.register_fake("sinkattn::attention")
@torch.library.register_fake("sinkattn::fwd")
@torch.library.register_fake("sinkattn::fwd_dense")
def _fwd(q, k, v, *arguments, **options):
    dtype = torch.bfloat16 if q.dtype == torch.float8_e4m3fn else q.dtype
    return q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=dtype), _fake_lse(q)


@torch.library.register_fake("sinkattn::fwd_dense_no_lse")
def _fwd_dense_no_lse(q, k, v, *arguments, **options):
    return _fwd(q, k, v)[0]


@torch.library.register_fake("sinkattn::fwd_out")
def _fwd_out(out, q, k, v, *arguments, **options):
    return _fake_lse(q)


@torch.library.register_fake("sinkattn::fwd_kvcache")
def _fwd_kvcache(out, q, k_cache, v_cache, k_new, v_new, *arguments, **options):
    return _fake_lse(q)


_BACKWARD_SINK = 23  # positions in the schema of bwd, for calls that pass everything by position
_BACKWARD_NEED_DQ, _BACKWARD_NEED_DKV = 21, 22


def _backward_option(arguments, options, position, name, default):
    if name in options:
        return options[name]
    return arguments[position] if len(arguments) > position else default


def _fake_dsink(q, arguments, options):
    sink = _backward_option(arguments, options, _BACKWARD_SINK, "learnable_sink", None)
    return q.new_empty((0,), dtype=torch.float32) if sink is None else sink.new_empty(sink.shape)


@torch.library.register_fake("sinkattn::bwd")
def _bwd(*arguments, **options):
    q, k, v = (
        _backward_option(arguments, options, i, name, None)
        for i, name in ((2, "q"), (3, "k"), (4, "v"))
    )
    need_dq = _backward_option(arguments, options, _BACKWARD_NEED_DQ, "need_dq", True)
    need_dkv = _backward_option(arguments, options, _BACKWARD_NEED_DKV, "need_dkv", True)

    def gradient(x, needed):
        return x.new_empty(x.shape if needed else (0,))

    return (
        gradient(q, need_dq),
        gradient(k, need_dkv),
        gradient(v, need_dkv),
        _fake_dsink(q, arguments, options),
    )


@torch.library.register_fake("sinkattn::bwd_out")
def _bwd_out(dq, dk, dv, *arguments, **options):
    q = _backward_option(arguments, options, 2, "q", None)
    dsink = _fake_dsink(q, arguments, options)
    dtype = _statistics_dtype(q)
    if q.dim() == 4:
        rows = (q.shape[1] + 127) // 128 * 128
        return q.new_empty((q.shape[0], q.shape[2], rows), dtype=dtype), dsink
    cu_seqlens_q = _backward_option(arguments, options, 7, "cu_seqlens_q", None)
    rows = (q.shape[0] + (cu_seqlens_q.shape[0] - 1) * 128 + 127) // 128 * 128
    return q.new_empty((q.shape[1], rows), dtype=dtype), dsink


def _fake_combined_lse(out_partial):
    sizes = list(out_partial.shape[1:-1])
    sizes[-1], sizes[-2] = sizes[-2], sizes[-1]
    return out_partial.new_empty(sizes).transpose(-1, -2)


@torch.library.register_fake("sinkattn::combine")
def _combine(out_partial, lse_partial, out_dtype=None, learnable_sink=None):
    out = out_partial.new_empty(out_partial.shape[1:], dtype=out_dtype or out_partial.dtype)
    return out, _fake_combined_lse(out_partial)


@torch.library.register_fake("sinkattn::combine_out")
def _combine_out(out, out_partial, lse_partial, learnable_sink=None):
    return _fake_combined_lse(out_partial)


@torch.library.register_fake("sinkattn::get_scheduler_metadata")
def _get_scheduler_metadata(batch_size, *arguments, **options):
    cache_seqlens = options.get("cache_seqlens")
    if cache_seqlens is None:
        cache_seqlens = arguments[7]
    return cache_seqlens.new_empty(((batch_size + 3) // 4 * 4 + 1,), dtype=torch.int32)
