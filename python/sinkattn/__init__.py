# SPDX-License-Identifier: Apache-2.0
"""Exact attention with a learnable sink, forward and backward, for NVIDIA Hopper and CPUs."""

from ._info import build_info, explain, is_available
from ._ops import version as _version
from .interface import (
    flash_attn_combine,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
    get_scheduler_metadata,
    merge_attention,
)
from .reference import attention_reference

__version__ = _version()
__all__ = [
    "attention_reference",
    "build_info",
    "explain",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
    "is_available",
    "merge_attention",
]
