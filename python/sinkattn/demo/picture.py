# SPDX-License-Identifier: Apache-2.0
"""The picture of a training run: loss curves, their distances, and what the sinks take."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

GRID = {"alpha": 0.25}


def draw(history: dict[str, list[float]], masses, every: int, path: Path, title: str) -> None:
    """history: losses per run; the first is the reference, the second ours, a third one a reference
    that started one rounding away. masses: per record a (layers, heads) tensor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layers = masses[0].shape[0]
    figure = plt.figure(figsize=(11, 7.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.15, 1])
    axes, apart = top.subplots(1, 2, width_ratios=[1.6, 1])
    (reference, expected), *others = history.items()
    axes.plot(expected, label=reference, color="#d98c21", lw=3.5, alpha=0.7)
    colours = ["#1f4e8c", "#8a8a8a"]
    for (name, losses), colour in zip(others, colours, strict=False):
        if colour == colours[0]:  # the others would hide it
            axes.plot(losses, label=name, color=colour, lw=1.3)
        # The floor keeps steps with equal losses on a logarithmic axis.
        gaps = [max(abs(a - b), 1e-8) for a, b in zip(losses, expected, strict=True)]
        apart.plot(list(accumulate(gaps, max)), label=name, color=colour, lw=1.6)
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title=title)
    apart.set(xlabel="step", yscale="log", title=f"largest distance to {reference} so far")
    for axis in (axes, apart):
        axis.legend(frameon=False, fontsize=9)
        axis.grid(**GRID)
    panels = bottom.subplots(1, layers, sharey=True)
    steps = [i * every for i in range(len(masses))]
    for layer, panel in enumerate(panels):
        for head in range(masses[0].shape[1]):
            panel.plot(steps, [float(m[layer, head]) for m in masses], lw=1.4)
        kind = "window 128" if layer % 2 == 0 else "full"
        panel.set_title(f"layer {layer}, {kind}", fontsize=9)
        panel.set_xlabel("step", fontsize=8)
        panel.grid(**GRID)
    panels[0].set_ylabel("mean sink mass, one line per head")
    panels[0].set_ylim(bottom=0)
    for axis in (axes, apart, *panels):
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
