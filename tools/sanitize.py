# SPDX-License-Identifier: Apache-2.0
"""compute-sanitizer over a reduced grid: every kernel, sizes up to 300. Needs a Hopper GPU.

    python tools/sanitize.py [memcheck initcheck synccheck racecheck]

Without arguments all four run. The logs go to build/sanitizer/<tool>.log; the exit status is 1 if
any tool found an error. A case whose kernel does not exist yet raises NotImplementedError and is
counted, so that an empty run is seen. memcheck and initcheck have to be clean. racecheck does not
understand every asynchronous copy: read its reports. `--grid cpu` runs the cases alone, on CPU
tensors: a check of the grid itself.

Builds with -DSINKATTN_LINEINFO=ON give source lines in the reports.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "build" / "sanitizer"
TOOLS = ("memcheck", "initcheck", "synccheck", "racecheck")
ERRORS_FOUND = 86  # an exit status that the grid itself never has
# All kernels live in this namespace. initcheck has to see the writes of torch's kernels too.
ONLY_OUR_KERNELS = ("--kernel-regex", "kns=sinkattn")

DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256), (40, 40), (64, 128))
MASKS = ({}, {"causal": True}, {"window_size": (70, 5)}, {"causal": True, "attention_chunk": 64})


# --- the grid: runs under the sanitizer -----------------------------------------------------------


device = "cuda"


def grid() -> int:
    """Every case once; prints what ran and what is not built."""
    import torch
    from sinkattn._info import unavailable_reason

    reason = unavailable_reason()
    if device == "cuda" and reason is not None:
        print(f"no Hopper GPU: {reason}")
        return 2
    ran, refused = 0, {}
    for name, case in cases():
        try:
            case()
            if device == "cuda":
                torch.cuda.synchronize()
            ran += 1
        except NotImplementedError as error:
            refused[str(error)] = refused.get(str(error), 0) + 1
        except Exception as error:
            print(f"{name}: {error}")
            raise
    for text, count in refused.items():
        print(f"not built, {count} cases: {text}")
    print(f"grid: {ran} cases ran, {sum(refused.values())} are not built", flush=True)
    return 0 if ran else 2


def place(*shape: int, dtype=None):
    """Random values, made on the CPU: the copy marks them as initialised."""
    import torch

    x = torch.randn(*shape)
    return x.to(dtype or torch.float32).to(device)


def integers(values: list) -> object:
    import torch

    return torch.tensor(values, dtype=torch.int32).to(device)


def cases():
    """(name, function) of each case."""
    import torch

    kinds = (torch.bfloat16, torch.float16)
    for dims, kind, mask in itertools.product(DIMS, kinds, MASKS):
        label = f"{dims} {kind} {mask}"
        yield f"dense {label}", lambda a=(dims, kind, mask): attention(*a)
        yield f"packed {label}", lambda a=(dims, kind, mask): packed(*a)
    for dims, paged, splits in itertools.product(DIMS, (False, True), (1, 3)):
        label = f"{dims} paged {paged} splits {splits}"
        yield f"cache {label}", lambda a=(dims, paged, splits): cache(*a)
    for kind, softcap in itertools.product(kinds, (0.0, 15.0)):
        yield (
            f"softcap {softcap} {kind}",
            lambda a=((64, 64), kind, {"softcap": softcap}): attention(*a),
        )
    for width, kind in itertools.product((8, 64, 128, 256), kinds):
        yield f"prepare {width} {kind}", lambda a=(width, kind): prepare(*a)
    for width, count in itertools.product((59, 64, 128, 512), (1, 3, 55)):
        yield f"combine {width} {count}", lambda a=(width, count): combine(*a)


def attention(dims, kind, mask) -> None:
    """Forward and backward, dense, ragged against every tile size."""
    import sinkattn
    import torch

    d, dv = dims
    q, k = place(2, 197, 6, d, dtype=kind), place(2, 261, 2, d, dtype=kind)
    v = place(2, 261, 2, dv, dtype=kind)
    sink = place(6)
    plain = sinkattn.flash_attn_func(q, k, v, learnable_sink=sink, **mask)
    leaves = [x.requires_grad_() for x in (q, k, v, sink)]
    for deterministic in (False, True):
        out, lse = sinkattn.flash_attn_func(
            *leaves[:3], learnable_sink=leaves[3], return_attn_probs=True,
            deterministic=deterministic, **mask,
        )  # fmt: skip
        seeds = (place(*plain.shape, dtype=kind), place(*lse.shape))
        torch.autograd.grad((out, lse), leaves, seeds)


def packed(dims, kind, mask) -> None:
    """Packed sequences: empty ones, tokens beyond the last, lengths below capacity."""
    import sinkattn
    import torch

    d, dv = dims
    leaves = [
        place(300, 6, d, dtype=kind), place(290, 2, d, dtype=kind), place(290, 2, dv, dtype=kind),
        place(6),
    ]  # fmt: skip
    leaves = [x.requires_grad_() for x in leaves]
    out, lse = sinkattn.flash_attn_varlen_func(
        *leaves[:3], integers([0, 130, 130, 131, 280]), integers([0, 64, 100, 100, 285]), 149, 185,
        seqused_k=integers([60, 36, 0, 185]), learnable_sink=leaves[3], return_attn_probs=True,
        **mask,
    )  # fmt: skip
    torch.autograd.grad((out, lse), leaves, (place(*out.shape, dtype=kind), place(*lse.shape)))


def cache(dims, paged, splits) -> None:
    """A decode step that appends with rotary embedding, then attends."""
    import sinkattn
    import torch

    d, dv = dims
    kind = torch.bfloat16
    shape = (12, 64) if paged else (3, 256)
    options = {}
    if paged:
        options["page_table"] = integers([[3, 1, 0, 11], [2, 4, 5, 6], [10, 9, 8, 7]])
    half = 16 if d >= 64 else 8
    sinkattn.flash_attn_with_kvcache(
        place(3, 2, 6, d, dtype=kind), place(*shape, 2, d, dtype=kind),
        place(*shape, 2, dv, dtype=kind), place(3, 2, 2, d, dtype=kind),
        place(3, 2, 2, dv, dtype=kind), rotary_cos=place(256, half, dtype=kind),
        rotary_sin=place(256, half, dtype=kind), cache_seqlens=integers([0, 131, 250]),
        causal=True, num_splits=splits, learnable_sink=place(6), **options,
    )  # fmt: skip


def prepare(width, kind) -> None:
    """D' and dsink alone: the operator, since no public function asks for them alone."""
    import sinkattn  # noqa: F401  (loads the operators)
    import torch

    out, dout = place(2, 201, 6, width, dtype=kind), place(2, 201, 6, width, dtype=kind)
    lse, dlse = place(2, 6, 201), place(2, 6, 201)
    key = place(2, 201, 1, width, dtype=kind)
    nothing = out.new_empty(0)
    for sink in (place(6), place(6).to(kind)):
        torch.ops.sinkattn.bwd_out(
            nothing, nothing, nothing, dout, dlse, out, key, key, out, lse,
            need_dq=False, need_dkv=False, learnable_sink=sink,
            seqused_q=integers([201, 77]),
        )  # fmt: skip


def combine(width, count) -> None:
    import sinkattn
    import torch

    partials, lse = place(count, 2, 33, 6, width), place(count, 2, 33, 6)
    for kind in (torch.float32, torch.bfloat16, torch.float16):
        sinkattn.flash_attn_combine(partials, lse, out_dtype=kind, learnable_sink=place(6))


# --- the driver -----------------------------------------------------------------------------------


def find_sanitizer() -> str | None:
    places = [shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer"]
    places += sorted(
        map(str, Path("/usr/local").glob("cuda-*/bin/compute-sanitizer")), reverse=True
    )
    return next((p for p in places if p and Path(p).exists()), None)


def run(sanitizer: str, tool: str) -> bool:
    """One tool over the grid; prints one line."""
    log = LOGS / f"{tool}.log"
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(ERRORS_FOUND)]
    if tool != "initcheck":
        command += ONLY_OUR_KERNELS
    # Every tensor gets an allocation of its own: an access beyond its end or to what an earlier
    # tensor left there is then visible.
    environment = os.environ | {
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]),
    }
    started = time.monotonic()
    with log.open("w") as file:
        status = subprocess.run(
            [*command, sys.executable, __file__, "--grid"],
            stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT,
        ).returncode  # fmt: skip
    text = log.read_text(errors="replace")
    summary = re.findall(r"=+ (?:ERROR|RACECHECK) SUMMARY: (.*)", text)
    ran = re.findall(r"^grid: (.*)", text, re.M)
    clean = status == 0 and bool(summary) and bool(ran)
    print(
        f"{tool:<10} {'clean' if clean else f'NOT CLEAN (exit status {status})'}: "
        f"{summary[-1] if summary else 'no summary'}; {ran[-1] if ran else 'the grid did not end'} "
        f"({time.monotonic() - started:.0f} s, {log})",
        flush=True,
    )
    return clean


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--grid"]:
        global device
        device = arguments[1] if len(arguments) > 1 else device
        return grid()
    unknown = [a for a in arguments if a not in TOOLS]
    if unknown:
        print(__doc__, file=sys.stderr)
        return 2
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print("sanitize: compute-sanitizer is neither on PATH nor under /usr/local/cuda*")
        return 2
    LOGS.mkdir(parents=True, exist_ok=True)
    results = [run(sanitizer, tool) for tool in arguments or TOOLS]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
