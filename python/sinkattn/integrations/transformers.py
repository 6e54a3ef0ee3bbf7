# SPDX-License-Identifier: Apache-2.0
"""Hugging Face Transformers: one line makes every model with attention backends use sinkattn.

    import sinkattn.integrations.transformers as integration
    integration.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="sinkattn")

Models that pass sinks (GPT-OSS) train them; models without sinks work as well.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from ..interface import flash_attn_func, flash_attn_varlen_func

KEY = "sinkattn"

# Keyword arguments that would change the result and that this function does not implement.
_REFUSED = ("head_mask", "attention_bias", "position_bias", "alibi", "alibi_slopes", "cache")


def register() -> str:
    """Registers the attention and mask functions; returns the key for `attn_implementation`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(KEY, attention)
    AttentionMaskInterface.register(KEY, attention_mask_2d)
    return KEY


def attention_mask_2d(
    batch_size, q_length, kv_length, q_offset=0, kv_offset=0, attention_mask=None, **kwargs
):
    """The mask function of the registry: (batch, keys) bool, or None where nothing is padding.

    Transformers' own function for unpadded attention, but for one case: a static cache that is not
    full needs a mask even where nothing is padding, because only the mask says how much it holds.
    """
    from transformers.masking_utils import flash_attention_mask

    mask = flash_attention_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        attention_mask=attention_mask,
        **kwargs,
    )
    held = int(q_offset) + q_length - int(kv_offset)
    if mask is None and held < kv_length:
        device = kwargs.get("device")
        mask = torch.ones((batch_size, held), dtype=torch.bool, device=device)
    return mask


class Packing(NamedTuple):
    """Packed sequences of one flattened batch."""

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int


def attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    sliding_window=None,
    softcap=None,
    is_causal=None,
    s_aux=None,
    **kwargs,
):
    """The attention function of the registry.

    Args:
        query: (b, h, sq, d); key, value: (b, hk, sk, ..), not repeated.
        attention_mask: None or (b, sk) bool, False for padding.
        scaling: softmax scale; sliding_window: visible tokens including the own one.
        s_aux: sinks (h,), passed on untouched, so that their gradient keeps their dtype.

    Returns: (out (b, sq, h, dv), None).
    """
    _refuse(module, attention_mask, dropout, kwargs)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    query, key, value = (x.transpose(1, 2) for x in _cast(module, query, key, value))
    if attention_mask is not None and attention_mask.shape[-1] < key.shape[1]:
        # A static cache is longer than what it holds; the mask says how much that is.
        key, value = (x[:, : attention_mask.shape[-1]] for x in (key, value))
    options = {
        "softmax_scale": scaling,
        "causal": bool(is_causal),
        "softcap": softcap or 0.0,
        "deterministic": _deterministic(),
        "learnable_sink": s_aux,
    }
    if sliding_window is not None and key.shape[1] > sliding_window:
        options["window_size"] = (sliding_window - 1, sliding_window - 1)
    if attention_mask is not None:
        return _padded(query, key, value, attention_mask.bool(), options), None
    packing = _given_packing(kwargs) or _packing_of_positions(query, key, kwargs)
    if packing is not None:
        out = flash_attn_varlen_func(
            query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), *packing, **options
        )
        return out.unflatten(0, query.shape[:2]), None
    return flash_attn_func(query, key, value, **options), None


def _refuse(module, attention_mask, dropout, kwargs) -> None:
    if dropout and module.training:
        raise NotImplementedError(f"dropout: expected 0 while training, got {dropout}")
    if kwargs.get("output_attentions"):
        raise NotImplementedError(
            "output_attentions: expected False (probabilities are never formed), got True"
        )
    if attention_mask is not None and attention_mask.dim() != 2:
        raise NotImplementedError(
            "attention_mask: expected None or a (batch, keys) padding mask, got "
            f"{attention_mask.dim()} dimensions"
        )
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{name}: expected None, got {type(kwargs[name]).__name__}")


def _cast(module, query, key, value):
    """Adapters leave fp32 queries behind in a 16-bit model: back to the dtype it computes in."""
    if query.dtype != torch.float32:
        return query, key, value
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    else:
        linear = (m.weight.dtype for m in module.modules() if isinstance(m, torch.nn.Linear))
        dtype = next((d for d in linear if d.is_floating_point), query.dtype)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _deterministic() -> bool:
    return (
        torch.are_deterministic_algorithms_enabled()
        or os.environ.get("FLASH_ATTENTION_DETERMINISTIC") == "1"
    )


def _cumulative(lengths: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _padded(query, key, value, mask, options):
    """Drops padding, attends to the packed rest, scatters back into zeros."""
    batch, sq = query.shape[:2]
    key_index = mask.flatten().nonzero().squeeze(1)
    key_lengths = mask.sum(1)
    # Queries are the last sq columns of the mask; a single one is never padding.
    query_mask = mask[:, -sq:] if sq > 1 else torch.ones_like(mask[:, :1])
    query_index = query_mask.flatten().nonzero().squeeze(1)
    query_lengths = query_mask.sum(1)
    out = flash_attn_varlen_func(
        query.flatten(0, 1)[query_index],
        key.flatten(0, 1)[key_index],
        value.flatten(0, 1)[key_index],
        _cumulative(query_lengths),
        _cumulative(key_lengths),
        int(query_lengths.max()),
        int(key_lengths.max()),
        **options,
    )
    full = out.new_zeros((batch * sq, *out.shape[1:]))
    return full.index_copy(0, query_index, out).unflatten(0, (batch, sq))


def _given_packing(kwargs) -> Packing | None:
    """cu_seq_lens from a data collator, with either spelling of the bounds."""
    cu_q, cu_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    longest_q = kwargs.get("max_length_q", kwargs.get("max_seqlen_q"))
    longest_k = kwargs.get("max_length_k", kwargs.get("max_seqlen_k"))
    if any(x is None for x in (cu_q, cu_k, longest_q, longest_k)):
        return None
    return Packing(cu_q.to(torch.int32), cu_k.to(torch.int32), int(longest_q), int(longest_k))


def _packing_of_positions(query, key, kwargs) -> Packing | None:
    """Sequences of one flattened row, recognised by positions that start again."""
    positions = kwargs.get("position_ids")
    if positions is None or query.shape[0] != 1 or query.shape[1] != key.shape[1]:
        return None
    if positions.dim() != 2 or positions.shape != query.shape[:2]:
        return None
    # Looking at the values costs a synchronisation on CUDA: once per tensor, not once per layer.
    found = getattr(positions, "_sinkattn_packing", False)
    if found is False:
        found = _find_packing(positions[0])
        positions._sinkattn_packing = found
    return found


def _find_packing(positions) -> Packing | None:
    if positions.numel() < 2 or bool((positions.diff() == 1).all()):
        return None
    starts = (positions == positions.min()).nonzero().squeeze(1)
    end = starts.new_tensor([positions.numel()])
    cu_seqlens = torch.cat([starts, end]).to(torch.int32)
    if int(cu_seqlens[0]) != 0:
        cu_seqlens = torch.cat([cu_seqlens.new_zeros(1), cu_seqlens])
    longest = int(cu_seqlens.diff().max())
    return Packing(cu_seqlens, cu_seqlens, longest, longest)
