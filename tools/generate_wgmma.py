# SPDX-License-Identifier: Apache-2.0
"""Writes src/hopper/ptx/wgmma_shapes.inl: one class per N of wgmma.mma_async.m64nNk16.

    python tools/generate_wgmma.py [--check]

The instruction names every accumulator register, so each N needs its own text. N is every multiple
of 8 up to 256 that a kernel uses; add it to SHAPES and run this again.
"""

from __future__ import annotations

import sys
from pathlib import Path

OUTPUT = Path(__file__).resolve().parent.parent / "src/hopper/ptx/wgmma_shapes.inl"
SHAPES = (8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120, 128, 136, 144, 152, 160)
SHAPES += (176, 192, 208, 224, 256)
PTX_TYPES = ("bf16", "f16")

HEAD = """// SPDX-License-Identifier: Apache-2.0
// Written by tools/generate_wgmma.py; included by wgmma.cuh alone.
// clang-format off
"""

CLASS = """
template <>
struct WgmmaShape<{n}> {{
  static constexpr int registers = {count};
{functions}}};
"""

FUNCTION = """  template <{template}>
  __device__ static void {name}(float (&d)[{count}], {parameters}, int accumulate) {{
    asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{scale}, 0;\\n"
      "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{type}.{type} "
      "{{{registers}}}, {operands};\\n}}\\n"
      : {outputs}
      : {inputs});
  }}
"""


def function(n: int, kind: str, suffix: str, ptx_type: str) -> str:
    count = n // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    if kind == "ss":
        template = "int TransposeA, int TransposeB"
        parameters = "std::uint64_t a, std::uint64_t b"
        inputs = '"l"(a), "l"(b), "r"(accumulate), "n"(TransposeA), "n"(TransposeB)'
        scale = count + 2
        operands = f"%{count}, %{count + 1}, p, 1, 1, %{count + 3}, %{count + 4}"
    else:
        template = "int TransposeB"
        parameters = "const std::uint32_t (&a)[4], std::uint64_t b"
        inputs = ", ".join(f'"r"(a[{i}])' for i in range(4))
        inputs += ', "l"(b), "r"(accumulate), "n"(TransposeB)'
        scale = count + 5
        a = ", ".join(f"%{count + i}" for i in range(4))
        operands = f"{{{a}}}, %{count + 4}, p, 1, 1, %{count + 6}"
    return FUNCTION.format(
        template=template,
        name=f"{kind}_{suffix}",
        count=count,
        parameters=parameters,
        scale=scale,
        n=n,
        type=ptx_type,
        registers=registers,
        operands=operands,
        outputs=outputs,
        inputs=inputs,
    )


def text() -> str:
    parts = [HEAD]
    for n in SHAPES:
        functions = "".join(
            function(n, kind, ptx_type, ptx_type) for ptx_type in PTX_TYPES for kind in ("ss", "rs")
        )
        parts.append(CLASS.format(n=n, count=n // 2, functions=functions))
    return "".join(parts)


def main() -> int:
    if "--check" in sys.argv[1:]:
        if OUTPUT.read_text() == text():
            return 0
        print(f"{OUTPUT.name} differs from what tools/generate_wgmma.py writes", file=sys.stderr)
        return 1
    OUTPUT.write_text(text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
