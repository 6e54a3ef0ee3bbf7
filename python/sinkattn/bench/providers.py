# SPDX-License-Identifier: Apache-2.0
"""Implementations of attention that are measured side by side.

A provider turns (case, inputs) into a forward function. Whatever it cannot do it refuses with
`UnsupportedError` and a reason, which is printed: a missing number is never silent.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .cases import Case


class UnsupportedError(RuntimeError):
    """This provider does not serve this case; the text says why."""


@dataclass
class Inputs:
    """(b, s, h, d) tensors, or packed (total, h, d) with cu_seqlens; the sink is (h,) fp32."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    dout: torch.Tensor
    sink: torch.Tensor
    cu_seqlens: torch.Tensor | None = None
    cache_seqlens: torch.Tensor | None = None


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Normal random inputs; the sink is 2 N(0, 1)."""
    generator = torch.Generator(device=device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    head = (sum(case.lengths),) if case.packed else (case.batch, case.seqlen_q)
    head_k = (sum(case.lengths),) if case.packed else (case.batch, case.seqlen_k)
    inputs = Inputs(
        query=normal(*head, case.heads_q, case.headdim),
        key=normal(*head_k, case.heads_kv, case.headdim),
        value=normal(*head_k, case.heads_kv, case.headdim_v),
        dout=normal(*head, case.heads_q, case.headdim_v),
        sink=2 * normal(case.heads_q, dtype=torch.float32),
    )
    if case.packed:
        ends = torch.tensor((0, *case.lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        inputs.cu_seqlens = ends.to(device)
    if case.decode:
        lengths = case.lengths or (case.seqlen_k,) * case.batch
        inputs.cache_seqlens = torch.tensor(lengths, dtype=torch.int32, device=device)
    return inputs


Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Provider:
    """`forward_function` returns f(q, k, v, sink) -> out, in the layout of the inputs."""

    name = ""
    has_sink = True  # result includes the sink
    devices: tuple[str, ...] = ("cuda",)

    def version(self) -> str:
        return torch.__version__

    def forward_function(self, case: Case, inputs: Inputs) -> Forward:
        raise NotImplementedError

    def check_device(self, device: torch.device) -> None:
        if device.type not in self.devices:
            raise UnsupportedError(f"not for {device.type}")


def _import(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnsupportedError(f"{name} is not installed ({error})") from None


class SinkAttn(Provider):
    """This library."""

    name = "sinkattn"
    devices = ("cuda", "cpu")

    def __init__(self, deterministic: bool = False, with_sink: bool = True):
        self.deterministic = deterministic
        self.has_sink = with_sink
        if deterministic:
            self.name += "-deterministic"
        if not with_sink:
            self.name += "-nosink"

    def version(self) -> str:
        return importlib.import_module("sinkattn").__version__

    def forward_function(self, case: Case, inputs: Inputs) -> Forward:
        import sinkattn

        options = {
            "causal": case.causal,
            "window_size": case.window_size,
            "deterministic": self.deterministic,
        }

        def sink_of(sink):
            return sink if self.has_sink else None

        if case.decode:

            def decode(q, k, v, sink):
                return sinkattn.flash_attn_with_kvcache(
                    q,
                    k,
                    v,
                    cache_seqlens=inputs.cache_seqlens,
                    causal=True,
                    window_size=case.window_size,
                    learnable_sink=sink_of(sink),
                )

            return decode
        if case.packed:
            longest = max(case.lengths)

            def varlen(q, k, v, sink):
                cu = inputs.cu_seqlens
                return sinkattn.flash_attn_varlen_func(
                    q, k, v, cu, cu, longest, longest, learnable_sink=sink_of(sink), **options
                )

            return varlen
        return lambda q, k, v, sink: sinkattn.flash_attn_func(
            q, k, v, learnable_sink=sink_of(sink), **options
        )


class SinkAttnPaged(Provider):
    """This library against a paged cache whose pages lie in memory in random order."""

    def __init__(self, page_size: int):
        self.page_size = page_size
        self.name = f"sinkattn-page{page_size}"

    def version(self) -> str:
        return importlib.import_module("sinkattn").__version__

    def forward_function(self, case: Case, inputs: Inputs) -> Forward:
        import sinkattn

        if not case.decode:
            raise UnsupportedError("decode only")
        if case.seqlen_k % self.page_size:
            raise UnsupportedError(f"{case.seqlen_k} slots are not whole pages")
        pages = case.batch * case.seqlen_k // self.page_size
        generator = torch.Generator(device=inputs.key.device).manual_seed(1)
        order = torch.randperm(pages, generator=generator, device=inputs.key.device)
        pools = []
        for cache in (inputs.key, inputs.value):
            pool = torch.empty_like(cache).view(pages, self.page_size, *cache.shape[2:])
            pool[order] = cache.view_as(pool)
            pools.append(pool)
        table = order.view(case.batch, -1).to(torch.int32)

        def decode(q, k, v, sink):
            return sinkattn.flash_attn_with_kvcache(
                q,
                *pools,
                cache_seqlens=inputs.cache_seqlens,
                page_table=table,
                causal=True,
                window_size=case.window_size,
                learnable_sink=sink,
            )

        return decode


class SinkAttnAppend(Provider):
    """This library with the query's own tokens appended in the same call, rotated by zero: all of
    the work, and the result of the plain call."""

    name = "sinkattn-append"

    def version(self) -> str:
        return importlib.import_module("sinkattn").__version__

    def forward_function(self, case: Case, inputs: Inputs) -> Forward:
        import sinkattn

        if not case.decode:
            raise UnsupportedError("decode only")
        before = inputs.cache_seqlens - case.seqlen_q
        batch = torch.arange(case.batch, device=before.device)[:, None]
        slots = before[:, None] + torch.arange(case.seqlen_q, device=before.device)
        new_k, new_v = inputs.key[batch, slots], inputs.value[batch, slots]
        table = (case.seqlen_k, case.headdim // 2)
        cos = torch.ones(table, dtype=inputs.query.dtype, device=before.device)
        sin = torch.zeros_like(cos)

        def decode(q, k, v, sink):
            return sinkattn.flash_attn_with_kvcache(
                q, k, v, new_k, new_v, rotary_cos=cos, rotary_sin=sin, cache_seqlens=before,
                causal=True, window_size=case.window_size, learnable_sink=sink,
            )  # fmt: skip

        return decode


class Sdpa(Provider):
    """torch scaled_dot_product_attention with one backend; it has no sink."""

    has_sink = False
    devices = ("cuda", "cpu")

    def __init__(self, backend: str):
        self.backend = backend
        self.name = f"sdpa-{backend}"
        self.devices = ("cpu",) if backend == "math" else ("cuda", "cpu")
        if backend == "cudnn":
            self.devices = ("cuda",)

    def version(self) -> str:
        if self.backend == "cudnn":
            return f"{torch.__version__} cudnn {torch.backends.cudnn.version()}"
        return torch.__version__

    def forward_function(self, case: Case, inputs: Inputs) -> Forward:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if case.lengths:
            raise UnsupportedError("no packed sequences")
        if case.window_left >= 0 or case.window_right >= 0:
            raise UnsupportedError("no window")
        if case.decode:
            raise UnsupportedError("no KV cache")
        backend = {
            "cudnn": SDPBackend.CUDNN_ATTENTION,
            "flash": SDPBackend.FLASH_ATTENTION,
            "math": SDPBackend.MATH,
        }[self.backend]

        def attend(q, k, v, sink):
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(
                    q.transpose(1, 2),
                    k.transpose(1, 2),
                    v.transpose(1, 2),
                    is_causal=case.causal,
                    enable_gqa=case.heads_q != case.heads_kv,
                )
            return out.transpose(1, 2)

        return attend


class Eager(Provider):
    """Materialised scores with the sink as an extra column, as model code writes it."""

    name = "eager"
    devices = ("cuda", "cpu")

    def forward_function(self, case: Case, inputs: Inputs) -> Forward:
        if case.lengths or case.decode:
            raise UnsupportedError("dense only")
        group = case.heads_q // case.heads_kv
        scale = 1.0 / math.sqrt(case.headdim)
        rows = torch.arange(case.seqlen_q, device=inputs.query.device)[:, None]
        rows = rows + case.seqlen_k - case.seqlen_q
        columns = torch.arange(case.seqlen_k, device=inputs.query.device)[None]
        hidden = torch.zeros(case.seqlen_q, case.seqlen_k, dtype=torch.bool, device=rows.device)
        if case.causal:
            hidden |= columns > rows
        if case.window_left >= 0:
            hidden |= columns < rows - case.window_left

        def attend(q, k, v, sink):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            k = k.repeat_interleave(group, dim=1)
            v = v.repeat_interleave(group, dim=1)
            scores = torch.matmul(q, k.transpose(2, 3)) * scale
            scores = scores.masked_fill(hidden, float("-inf"))
            column = sink.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            weights = torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1]
            return torch.matmul(weights, v).transpose(1, 2)

        return attend


class Flex(Provider):
    """Compiled FlexAttention, sink folded in afterwards through its LSE (exact, differentiable)."""

    name = "flex+sink"

    def forward_function(self, case: Case, inputs: Inputs) -> Forward:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if case.lengths or case.decode:
            raise UnsupportedError("dense only in this benchmark")
        left = case.window_left

        def keep(b, h, i, j):
            visible = i >= j
            if left >= 0:
                visible = visible & (i - j <= left)
            return visible

        block_mask = None
        if case.causal:
            block_mask = create_block_mask(
                keep, None, None, case.seqlen_q, case.seqlen_k, device=str(inputs.query.device)
            )
        compiled = torch.compile(flex_attention)

        def attend(q, k, v, sink):
            out, lse = compiled(
                q.transpose(1, 2),
                k.transpose(1, 2),
                v.transpose(1, 2),
                block_mask=block_mask,
                enable_gqa=case.heads_q != case.heads_kv,
                return_lse=True,
            )
            weight = torch.sigmoid(lse - sink.view(1, -1, 1))
            return (out * weight.unsqueeze(-1)).to(q.dtype).transpose(1, 2)

        return attend


class FlashAttention3(Provider):
    """Upstream FA3; it has no sink."""

    name = "fa3"
    has_sink = False

    def version(self) -> str:
        return str(getattr(_import("flash_attn_interface"), "__version__", "3"))

    def forward_function(self, case: Case, inputs: Inputs) -> Forward:
        fa3 = _import("flash_attn_interface")
        options = {"causal": case.causal, "window_size": case.window_size}

        def first(result):
            return result[0] if isinstance(result, tuple) else result

        if case.decode:
            return lambda q, k, v, sink: first(
                fa3.flash_attn_with_kvcache(q, k, v, cache_seqlens=inputs.cache_seqlens, **options)
            )
        if case.packed:
            longest = max(case.lengths)
            cu = inputs.cu_seqlens
            return lambda q, k, v, sink: first(
                fa3.flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, **options)
            )
        return lambda q, k, v, sink: first(fa3.flash_attn_func(q, k, v, **options))


class FlashAttention4(Provider):
    """FA4's CuTe kernels (JIT), with their learnable sink."""

    name = "fa4+sink"

    def version(self) -> str:
        return str(getattr(_import("flash_attn.cute"), "__version__", "4"))

    def forward_function(self, case: Case, inputs: Inputs) -> Forward:
        fa4 = _import("flash_attn.cute")
        if case.lengths or case.decode:
            raise UnsupportedError("dense only in this benchmark")
        window = tuple(None if side < 0 else side for side in case.window_size)

        def attend(q, k, v, sink):
            result = fa4.flash_attn_func(
                q, k, v, causal=case.causal, window_size=window, learnable_sink=sink.to(q.dtype)
            )
            return result[0] if isinstance(result, tuple) else result

        return attend


PROVIDERS: dict[str, Callable[[], Provider]] = {
    "sinkattn": SinkAttn,
    "sinkattn-nosink": lambda: SinkAttn(with_sink=False),
    "sinkattn-deterministic": lambda: SinkAttn(deterministic=True),
    "sinkattn-page64": lambda: SinkAttnPaged(64),
    "sinkattn-page16": lambda: SinkAttnPaged(16),
    "sinkattn-append": SinkAttnAppend,
    "sdpa-cudnn": lambda: Sdpa("cudnn"),
    "sdpa-flash": lambda: Sdpa("flash"),
    "sdpa-math": lambda: Sdpa("math"),
    "eager": Eager,
    "flex+sink": Flex,
    "fa3": FlashAttention3,
    "fa4+sink": FlashAttention4,
}
DEFAULTS = {
    "cuda": (
        *("sinkattn", "sinkattn-page64", "sinkattn-page16", "sinkattn-append"),
        *("sdpa-cudnn", "sdpa-flash", "flex+sink", "fa3", "fa4+sink"),
    ),
    "cpu": ("sinkattn", "eager", "sdpa-flash"),
}
