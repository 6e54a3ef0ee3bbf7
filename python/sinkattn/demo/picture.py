# SPDX-License-Identifier: Apache-2.0
"""The picture of a training run: both loss curves, and what the sinks take."""

from __future__ import annotations

from pathlib import Path

GRID = {"alpha": 0.25}


def draw(history: dict[str, list[float]], masses, every: int, path: Path, title: str) -> None:
    """history: losses per attention name. masses: per record a (layers, heads) tensor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layers = masses[0].shape[0]
    figure = plt.figure(figsize=(11, 7.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.15, 1])
    axes = top.subplots()
    styles = [{"color": "#d98c21", "lw": 3.5, "alpha": 0.7}, {"color": "#1f4e8c", "lw": 1.3}]
    for (name, losses), style in zip(history.items(), styles, strict=False):
        axes.plot(range(len(losses)), losses, label=name, **style)
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title=title)
    axes.legend(frameon=False)
    axes.grid(**GRID)
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
    for axis in (axes, *panels):
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
