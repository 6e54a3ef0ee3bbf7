# SPDX-License-Identifier: Apache-2.0
"""Snapshot of the public and the compatibility signatures, defaults included."""

from __future__ import annotations

import inspect
import re

import pytest
import sinkattn
from sinkattn import interface

SINK = "*, s_aux=None, sinks=None, learnable_sink=None"
DESCALES = "q_descale=None, k_descale=None, v_descale=None"
PACKED = (
    "softmax_scale=None, causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, "
    "num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False, "
    "s_aux=None, sinks=None, learnable_sink=None"
)
SIGNATURES = {
    "flash_attn_func": "(q, k, v, softmax_scale=None, causal=False, qv=None, "
    f"{DESCALES}, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, "
    f"pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False, {SINK})",
    "flash_attn_varlen_func": "(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, "
    "seqused_q=None, seqused_k=None, softmax_scale=None, causal=False, qv=None, "
    f"{DESCALES}, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, "
    "pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False, *, "
    "page_table=None, scheduler_metadata=None, out=None, s_aux=None, sinks=None, "
    "learnable_sink=None)",
    "flash_attn_qkvpacked_func": f"(qkv, softmax_scale=None, causal=False, {DESCALES}, "
    "window_size=(-1, -1), attention_chunk=0, softcap=0.0, deterministic=False, "
    f"num_heads_q=None, sm_margin=0, return_attn_probs=False, {SINK})",
    "flash_attn_with_kvcache": "(q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, "
    "rotary_sin=None, cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, "
    "page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, "
    f"rotary_seqlens=None, {DESCALES}, softmax_scale=None, causal=False, window_size=(-1, -1), "
    "attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, "
    "num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False, *, out=None, "
    "max_seqlen_k=None, deterministic=False, s_aux=None, sinks=None, learnable_sink=None)",
    "flash_attn_combine": f"(out_partial, lse_partial, out=None, out_dtype=None, {SINK})",
    "get_scheduler_metadata": "(batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, "
    "num_heads_kv, headdim, cache_seqlens, qkv_dtype=torch.bfloat16, headdim_v=None, "
    "cu_seqlens_q=None, cu_seqlens_k_new=None, cache_leftpad=None, page_size=None, "
    "max_seqlen_k_new=0, causal=False, window_size=(-1, -1), attention_chunk=0, "
    "has_softcap=False, num_splits=0, pack_gqa=None, sm_margin=0)",
    "flash_attn_kvpacked_func": f"(q, kv, *, {PACKED})",
    "flash_attn_varlen_qkvpacked_func": "(qkv, cu_seqlens, max_seqlen, *, num_heads_q=None, "
    f"{PACKED})",
    "flash_attn_varlen_kvpacked_func": "(q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, "
    f"max_seqlen_k, *, {PACKED})",
    "merge_attention": "(outs, lses, *, out_dtype=None, s_aux=None, sinks=None, "
    "learnable_sink=None)",
    "attention_reference": "(q, k, v, *, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, "
    "seqused_k=None, qv=None, page_table=None, cache_batch_idx=None, cache_leftpad=None, "
    f"{DESCALES}, softmax_scale=None, causal=False, window_size=(-1, -1), attention_chunk=0, "
    "softcap=0.0, compute_dtype=torch.float64, s_aux=None, sinks=None, learnable_sink=None)",
    "is_available": "(device=None) -> bool",
    "build_info": "() -> dict",
    "explain": "(function, *args, **kwargs) -> str",
}
PRIVATE = {
    "_flash_attn_forward": "(q, k, v, k_new=None, v_new=None, qv=None, out_=None, "
    "cu_seqlens_q=None, cu_seqlens_k=None, cu_seqlens_k_new=None, seqused_q=None, "
    "seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None, kv_batch_idx=None, "
    f"leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, {DESCALES}, "
    "softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1, "
    "attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, "
    "num_splits=1, pack_gqa=None, sm_margin=0, *, out=None, window_size=None, s_aux=None, "
    "sinks=None, learnable_sink=None)",
    "_flash_attn_backward": "(dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, "
    "cu_seqlens_k=None, sequed_q=None, sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, "
    "dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False, window_size_left=-1, "
    "window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0, *, causal=None, "
    "window_size=None, dlse=None, s_aux=None, sinks=None, learnable_sink=None)",
    "maybe_contiguous": "(x)",
    "round_multiple": "(x, m)",
    "round_up_headdim": "(head_size: int) -> int",
}


def text(function) -> str:
    """The signature, with annotations written as in the source."""
    return str(inspect.signature(function)).replace("'", "")


def test_the_snapshot_is_complete():
    assert set(SIGNATURES) == set(sinkattn.__all__)


@pytest.mark.parametrize("name", SIGNATURES)
def test_public_signature(name):
    assert text(getattr(sinkattn, name)) == SIGNATURES[name]


@pytest.mark.parametrize("name", PRIVATE)
def test_compatibility_signature(name):
    assert text(getattr(interface, name)) == PRIVATE[name]


@pytest.mark.parametrize("name", SIGNATURES)
def test_parameters_are_documented(name):
    """Every parameter is named in the docstring of its function or of the one it refers to."""
    function = getattr(sinkattn, name)
    documents = [function.__doc__, interface.__doc__]
    for base in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"):
        documents.append(getattr(sinkattn, base).__doc__)
    documents = " ".join(documents)
    assert function.__doc__
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"\b{parameter}\b", documents), parameter


@pytest.mark.parametrize("keyword", ["dropout_p", "alibi_slopes", "bias", "block_table"])
def test_unknown_keywords_are_errors(keyword):
    for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"):
        with pytest.raises(TypeError, match=keyword):
            getattr(sinkattn, name)(**{keyword: None})
