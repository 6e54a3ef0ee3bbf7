# SPDX-License-Identifier: Apache-2.0
"""A small GPT-OSS with random weights, and text that every machine has."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

WINDOW = 128
EXPERTS = 4


class Batch(NamedTuple):
    """Token ids (rows, tokens); with positions that restart, each row packs several documents."""

    ids: torch.Tensor
    positions: torch.Tensor | None = None

    def to(self, device) -> Batch:
        return Batch(*(None if x is None else x.to(device) for x in self))

    def masks(self, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
        """Additive masks that keep packed documents apart, by kind of layer, for eager attention:
        written out, so that nothing depends on how a Transformers version detects packing."""
        if self.positions is None:
            return None
        document = (self.positions == 0).cumsum(-1)
        place = torch.arange(self.ids.shape[1], device=self.ids.device)
        distance = place[:, None] - place[None, :]
        seen = (document[:, :, None] == document[:, None, :]) & (distance >= 0)

        def additive(visible):
            mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
            return mask.masked_fill(~visible, torch.finfo(dtype).min)[:, None]

        return {
            "full_attention": additive(seen),
            "sliding_attention": additive(seen & (distance < WINDOW)),
        }


@dataclass(frozen=True)
class Size:
    """Width of the model and length of a row of tokens."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    context: int


SIZES = {
    "small": Size(128, 8, 2, 32, 4, 256),
    # GPT-OSS's own head dim and heads per KV head; for a GPU.
    "large": Size(512, 16, 2, 64, 8, 2048),
}


def make_model(
    attention: str, seed: int = 0, experts_per_token: int = EXPERTS, size: Size = SIZES["small"]
):
    """GptOssForCausalLM over bytes; layers alternate between a 128-token window and full.

    All experts serve every token unless told otherwise: a choice among them turns a rounding into
    another expert, and two runs that are compared drift apart (docs/numerics.md)."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=256,
        hidden_size=size.hidden,
        intermediate_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        num_local_experts=EXPERTS,
        num_experts_per_tok=experts_per_token,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * (size.layers // 2),
        max_position_embeddings=max(1024, size.context),
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


def batches(
    data: torch.Tensor, steps: int, rows: int, context: int, seed: int = 1
) -> Iterator[Batch]:
    """Windows of the text at random places, the same for every run."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(0, data.numel() - context, (rows,), generator=generator)
        yield Batch(torch.stack([data[s : s + context] for s in starts.tolist()]).long())


def packed_batches(
    data: torch.Tensor, steps: int, rows: int, context: int, seed: int = 1
) -> Iterator[Batch]:
    """The same number of tokens in one row: pieces of 1 to `context` tokens, one behind another."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids, positions = [], []
        left = rows * context
        while left > 0:
            length = min(left, int(torch.randint(1, context + 1, (), generator=generator)))
            start = int(torch.randint(0, data.numel() - length, (), generator=generator))
            ids.append(data[start : start + length])
            positions.append(torch.arange(length))
            left -= length
        yield Batch(torch.cat(ids).long()[None], torch.cat(positions)[None])
