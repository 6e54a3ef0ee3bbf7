# SPDX-License-Identifier: Apache-2.0
"""Benchmark cases: shapes that matter, their useful work, and the time no kernel can beat."""

from __future__ import annotations

from dataclasses import dataclass, replace

# Hopper facts behind limit_ms: dense bf16 rate and exp throughput of 132 SMs at 1.83 GHz
# (NVIDIA H100 datasheet; 16 MUFU results per clock and SM, CUDA C++ Programming Guide, arithmetic
# throughput table for compute capability 9.0).
BF16_FLOPS = 989.5e12
EXP_PER_SECOND = 132 * 16 * 1.83e9


@dataclass(frozen=True)
class Case:
    """One attention problem. Lengths in tokens; window counts exclude the query itself (FA3)."""

    group: str
    batch: int
    seqlen_q: int
    seqlen_k: int
    heads_q: int
    heads_kv: int
    headdim: int
    headdim_v: int
    causal: bool = False
    window_left: int = -1
    window_right: int = -1
    lengths: tuple[int, ...] = ()  # of packed sequences, or used slots of a cache; len == batch
    dtype: str = "bfloat16"
    timing: str = "eager"  # eager | graph
    decode: bool = False

    @property
    def mask(self) -> str:
        return "causal" if self.causal else "full"

    @property
    def window_size(self) -> tuple[int, int]:
        return (self.window_left, self.window_right)

    @property
    def packed(self) -> bool:
        return bool(self.lengths) and not self.decode

    @property
    def label(self) -> str:
        dim = str(self.headdim)
        if self.headdim_v != self.headdim:
            dim += f"/{self.headdim_v}"
        size = f"{self.batch}x{self.seqlen_k}"
        if self.lengths:
            size = f"varlen {sum(self.lengths)} in {self.batch}"
        if self.seqlen_q > 1 and self.decode:
            size += f" q{self.seqlen_q}"
        mask = self.mask
        if self.window_left >= 0:
            mask = f"W={self.window_left + 1}"
        return f"{size} {self.heads_q}/{self.heads_kv} d{dim} {mask} {self.dtype}"

    def visible_pairs(self) -> int:
        """(query, key) pairs that are visible, per head, summed over the batch."""
        if self.lengths:
            return sum(_pairs(self.seqlen_q if self.decode else n, n, self) for n in self.lengths)
        return self.batch * _pairs(self.seqlen_q, self.seqlen_k, self)

    def flops(self, direction: str) -> float:
        """Useful operations: forward 2 matmuls, backward 5 (scores recomputed)."""
        d, dv = self.headdim, self.headdim_v
        per_pair = 3 * d + 2 * dv if direction == "bwd" else d + dv
        return 2.0 * self.heads_q * self.visible_pairs() * per_pair

    def bytes(self, direction: str) -> float:
        """Mandatory traffic: every input read once, every output written once."""
        size = 4 if self.dtype == "float32" else 2
        rows_q = sum(self.lengths) if self.packed else self.batch * self.seqlen_q
        keys = self.lengths or (self.seqlen_k,) * self.batch
        if self.decode and self.window_left >= 0:  # the rest of the cache is never read
            keys = tuple(min(n, self.window_left + self.seqlen_q) for n in keys)
        rows_k = sum(keys)
        query = rows_q * self.heads_q * self.headdim * size
        out = rows_q * self.heads_q * self.headdim_v * size
        key_value = rows_k * self.heads_kv * (self.headdim + self.headdim_v) * size
        lse = rows_q * self.heads_q * 4
        forward = query + out + key_value + lse
        return float(2 * forward - lse if direction == "bwd" else forward)

    def limit_ms(self, direction: str, copy_bytes_per_second: float) -> float:
        """Largest of the matmul, exp and memory floors, in milliseconds."""
        exps = self.heads_q * self.visible_pairs()
        seconds = max(
            self.flops(direction) / BF16_FLOPS,
            exps / EXP_PER_SECOND,
            self.bytes(direction) / copy_bytes_per_second,
        )
        return seconds * 1e3


def _pairs(sq: int, sk: int, case: Case) -> int:
    right = 0 if case.causal else case.window_right
    total = 0
    for i in range(sq):
        p = i + sk - sq
        begin = max(0, p - case.window_left) if case.window_left >= 0 else 0
        end = min(sk, p + right + 1) if right >= 0 else sk
        total += max(0, end - begin)
    return total


def _square(group: str, batch: int, length: int, heads: tuple[int, int], dims, **options) -> Case:
    headdim, headdim_v = dims if isinstance(dims, tuple) else (dims, dims)
    return Case(group, batch, length, length, *heads, headdim, headdim_v, **options)


def packed_lengths(total: int = 32768, shortest: int = 128, longest: int = 8192) -> tuple[int, ...]:
    """A fixed mixture of sequence lengths that fills `total` tokens (multiplicative congruence)."""
    lengths: list[int] = []
    state = 12345
    while (left := total - sum(lengths)) > 0:
        state = (1103515245 * state + 12345) % 2**31  # C standard's example generator
        octave = (longest // shortest).bit_length() - 1
        exponent = octave * state / 2**31
        lengths.append(min(left, int(shortest * 2.0**exponent)))
    return tuple(lengths)


def training_cases() -> list[Case]:
    """The shapes of the forward and backward tables."""
    gpt_oss, mimo, wide = (64, 8), (64, 4), (32, 8)
    lengths = packed_lengths()
    varlen = _square("training", len(lengths), max(lengths), gpt_oss, 64, causal=True)
    return [
        _square("training", 2, 8192, gpt_oss, 64, causal=True),
        _square("training", 1, 32768, gpt_oss, 64, causal=True),
        _square("training", 2, 8192, gpt_oss, 64),
        _square("training", 2, 8192, gpt_oss, 64, causal=True, window_left=127, timing="graph"),
        _square("training", 2, 8192, gpt_oss, 64, causal=True, window_left=1023),
        _square("training", 2, 8192, gpt_oss, 128, causal=True),
        _square("training", 2, 8192, gpt_oss, 128),
        _square("training", 2, 8192, (16, 16), 128, causal=True),
        _square("training", 2, 8192, (16, 16), 128),
        _square("training", 2, 8192, mimo, (192, 128), causal=True),
        _square("training", 2, 8192, wide, 256, causal=True),
        _square("training", 2, 8192, wide, 256),
        _square("training", 4, 2048, wide, 128, causal=True, timing="graph"),
        replace(varlen, lengths=lengths),
    ]


def mixed_lengths(count: int, shortest: int = 128, longest: int = 32768) -> tuple[int, ...]:
    """Lengths of `count` sequences, even on a logarithmic scale, in a fixed shuffled order."""
    steps = [shortest * (longest / shortest) ** (i / (count - 1)) for i in range(count)]
    return tuple(int(steps[(i * 37) % count]) for i in range(count))  # 37 is coprime to 64


def decode_cases() -> list[Case]:
    """One query token (or a few) against a cache, GPT-OSS heads."""
    shapes = [(1, 4096), (1, 32768), (1, 131072), (16, 4096), (64, 4096), (16, 32768), (128, 8192)]

    def case(batch, context, headdim, queries=1, **options):
        shape = (batch, queries, context, 64, 8, headdim, headdim)
        return Case("decode", *shape, causal=True, timing="graph", decode=True, **options)

    mixed = mixed_lengths(64)
    return [
        *(case(b, s, d) for d in (64, 128) for b, s in shapes),
        case(64, max(mixed), 64, lengths=mixed),
        case(64, 4096, 64, window_left=127),
        case(64, 16384, 64, window_left=127),
        case(16, 4096, 64, queries=4),
    ]


def cpu_cases() -> list[Case]:
    """What a machine without a GPU can time in a minute."""
    base = Case("cpu", 1, 2048, 2048, 8, 2, 64, 64, causal=True)
    return [replace(base, dtype="float32"), base]


GROUPS = {"training": training_cases, "decode": decode_cases, "cpu": cpu_cases}
