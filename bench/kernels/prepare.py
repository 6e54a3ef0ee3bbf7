# SPDX-License-Identifier: Apache-2.0
"""Bandwidth of the backward's prepare pass beside a device-to-device copy: CUDA-graph replay."""

from __future__ import annotations

import torch
from sinkattn.bench.timing import Timer, copy_rate, graphed


def main() -> None:
    device = torch.device("cuda", 0)
    timer = Timer(device)
    rate = copy_rate(device)
    print(f"{torch.cuda.get_device_name()}, copy {rate / 1e9:.0f} GB/s")
    for b, s, h, dv in (
        (2, 8192, 64, 64),
        (1, 32768, 64, 64),
        (2, 8192, 64, 128),
        (2, 8192, 32, 256),
    ):
        out, dout = (torch.randn(b, s, h, dv, device=device).bfloat16() for _ in range(2))
        lse = torch.randn(b, h, s, device=device)
        key = out.new_zeros(b, 1, 1, dv)
        sink = torch.randn(h, device=device)

        def run(out=out, dout=dout, lse=lse, key=key, sink=sink):
            return torch.ops.sinkattn.bwd(
                dout,
                None,
                out,
                key,
                key,
                out,
                lse,
                need_dq=False,
                need_dkv=False,
                learnable_sink=sink,
            )

        ms = timer.median_ms({"prepare": graphed(lambda run=run: run)})["prepare"]
        moved = 2 * out.numel() * 2 + 3 * lse.numel() * 4
        print(
            f"{b}x{s} h{h} dv{dv}: {ms * 1e3:.1f} us, {moved / ms / 1e6:.0f} GB/s, "
            f"{100 * moved / ms / 1e-3 / rate:.0f} % of copy"
        )


if __name__ == "__main__":
    main()
