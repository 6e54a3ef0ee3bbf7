# SPDX-License-Identifier: Apache-2.0
"""Tables, CSV and picture of a benchmark run."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from .run import CASE_COLUMNS, COLUMNS

Row = dict[str, object]
KEY = (*CASE_COLUMNS, "timing")


def case_key(row: Row) -> tuple:
    """What makes two rows comparable: everything but the provider."""
    return tuple(row[name] for name in KEY)


def label(row: Row) -> str:
    dim = str(row["headdim"])
    if row["headdim_v"] != row["headdim"]:
        dim += f"/{row['headdim_v']}"
    size = f"{row['batch']}x{row['seqlen_k']}"
    if row["varlen"]:
        size = f"varlen {sum(map(int, str(row['varlen']).split('+')))}"
    if row["direction"] == "decode" and int(row["seqlen_q"]) > 1:
        size += f" q{row['seqlen_q']}"
    mask = f"W={int(row['window_left']) + 1}" if int(row["window_left"]) >= 0 else row["mask"]
    dtype = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[str(row["dtype"])]
    return f"{row['direction']} {size} {row['heads_q']}/{row['heads_kv']} d{dim} {mask} {dtype}"


def write_csv(rows: Sequence[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def write_environment(facts: dict[str, object], path: Path) -> None:
    path.write_text(json.dumps(facts, indent=2) + "\n")


def group_rows(rows: Sequence[Row]) -> dict[tuple, dict[str, Row]]:
    groups: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(case_key(row), {})[str(row["provider"])] = row
    return groups


def table(rows: Sequence[Row], baseline: str) -> str:
    """Markdown: one line per case, ms (TFLOPS, or GB/s for decode) and the ratio to `baseline`."""
    providers = list(dict.fromkeys(str(row["provider"]) for row in rows))
    lines = ["| case | " + " | ".join(providers) + " | limit ms |"]
    lines.append("|---" * (len(providers) + 2) + "|")
    for group in group_rows(rows).values():
        first = next(iter(group.values()))
        cells = [f"{label(first)} ({first['timing']})"]
        for name in providers:
            row = group.get(name)
            if row is None:
                cells.append("–")
                continue
            cell = f"{float(row['ms']):.3f} ({_rate(row)})"
            if baseline in group and name != baseline:
                cell += f" {float(group[baseline]['ms']) / float(row['ms']):.2f}x"
            cells.append(cell)
        cells.append(str(first["limit_ms"]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rate(row: Row) -> str:
    if row["direction"] == "decode":
        return f"{float(row['gbps']):.0f} GB/s"
    tflops = float(row["tflops"])
    return f"{tflops:.0f} TFLOPS" if tflops >= 10 else f"{1e3 * tflops:.0f} GFLOPS"


def picture(rows: Sequence[Row], path: Path, title: str) -> None:
    """Horizontal bars of speed as a fraction of the limit (of the fastest where none is known)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = list(group_rows(rows).values())
    providers = list(dict.fromkeys(str(row["provider"]) for row in rows))
    palette = plt.get_cmap("tab10")
    height = 0.8 / len(providers)
    figure, axes = plt.subplots(figsize=(10, 0.55 * len(groups) * max(1, len(providers) / 3) + 1.4))
    has_limit = any(str(row["limit_ms"]) for row in rows)
    for index, name in enumerate(providers):
        positions, values = [], []
        for place, group in enumerate(groups):
            if name not in group:
                continue
            row = group[name]
            best = min(float(other["ms"]) for other in group.values())
            goal = float(row["limit_ms"]) if str(row["limit_ms"]) else best
            positions.append(place + (index - (len(providers) - 1) / 2) * height)
            values.append(100 * goal / float(row["ms"]))
        bars = axes.barh(positions, values, height * 0.92, label=name, color=palette(index % 10))
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=7)
    axes.set_yticks(range(len(groups)), [label(next(iter(g.values()))) for g in groups], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 109)
    goal = "physical limit (matmul, exp, memory)" if has_limit else "fastest provider"
    axes.set_xlabel(f"speed, % of the {goal}")
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
