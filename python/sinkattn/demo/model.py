# SPDX-License-Identifier: Apache-2.0
"""A small GPT-OSS with random weights, and text that every machine has."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch

CONTEXT = 256
WINDOW = 128
EXPERTS = 4


def make_model(attention: str, seed: int = 0, layers: int = 4, experts_per_token: int = EXPERTS):
    """GptOssForCausalLM over bytes; layers alternate between a 128-token window and full.

    All experts serve every token unless told otherwise: a choice among them turns a rounding into
    another expert, and two runs that are compared drift apart (docs/numerics.md)."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=EXPERTS,
        num_experts_per_tok=experts_per_token,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * (layers // 2),
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation=attention,
    )
    torch.manual_seed(seed)
    return GptOssForCausalLM(config)


def sinks_of(model) -> list[torch.nn.Parameter]:
    """The sink parameter of every layer, (heads,) each."""
    return [layer.self_attn.sinks for layer in model.model.layers]


def corpus(limit: int = 4_000_000) -> torch.Tensor:
    """Bytes of the Python standard library's sources, in a fixed order."""
    parts, size = [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = path.read_bytes()
        parts.append(text)
        size += len(text)
        if size >= limit:
            break
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)


def batches(data: torch.Tensor, steps: int, batch: int, seed: int = 1):
    """(batch, CONTEXT) windows of the text at random places, the same for every run."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(0, data.numel() - CONTEXT, (batch,), generator=generator)
        yield torch.stack([data[s : s + CONTEXT] for s in starts.tolist()]).long()
