"""The tables and the picture of an evaluation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from layerzoo.support.plot_style import COLOURS, tidy

from .costs import MeasuredCost
from .costs import table as cost_table
from .probe import by_depth

SMOOTH = 128
"""Positions of a running mean."""


def page(found: dict[str, Any], out: Path) -> str:
    """All tables in Markdown, also written to evaluation.md; evaluation.png beside it."""
    parts = []
    if "probe" in found:
        parts.append(probe_table(found["probe"]))
    if "positions" in found:
        parts += [text_table(text, part) for text, part in found["positions"].items()]
        draw(found["positions"], found["window"], out / "evaluation.png")
    if "retrieval" in found:
        parts.append(retrieval_table(found["retrieval"], found["window"]))
    if "costs" in found:
        parts.append(cost_table([MeasuredCost(**row) for row in found["costs"]]))
    if "harness" in found:
        parts.append(harness_table(found["harness"]))
    text = "\n\n".join(parts)
    (out / "evaluation.md").write_text(text + "\n", encoding="utf-8")
    return text


def lines_of(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])


def interval(one: dict[str, float], percent: bool = False) -> str:
    if percent:
        return f"{100 * one['value']:.1f}% ±{100 * one['half']:.1f}"
    return f"{one['value']:.3f} ±{one['half']:.3f}"


def text_table(text: str, part: dict[str, Any]) -> str:
    arms = list(next(iter(part["ranges"].values()))["nats"])
    others = [arm for arm in arms if arm not in ("full", "window")]
    controls = [arm for arm in others if arm != "memory"]
    rows, shares = [], []
    for name, figures in part["ranges"].items():
        rows.append([name, *(f"{figures['nats'][arm]:.3f}" for arm in arms)])
        if "drift" in figures:
            drift = [interval(figures["drift"][arm]) for arm in others]
            shares.append(["drift inside, nats", *drift, *("" for _ in controls)])
        else:
            of = [("recovered", arm) for arm in others] + [("beyond", arm) for arm in controls]
            cells = [interval(figures[what][arm], percent=True) for what, arm in of]
            shares.append([name, *cells])
    title = f"**{text}**, {part['files']} files, nats a token"
    head = ["recovered of the gap", *others, *(f"memory less {arm}" for arm in controls)]
    return "\n\n".join((title, lines_of(["positions", *arms], rows), lines_of(head, shares)))


def probe_table(found: dict[str, list[float]]) -> str:
    rows = [[name, *(f"{100 * mean:.1f}%" for mean in means)] for name, means in by_depth(found)]
    what = "explained of what the window misses, beyond a constant (R² on other files)"
    return what + "\n\n" + lines_of(["blocks", *found], rows)


def retrieval_table(found: list[dict[str, Any]], window: int) -> str:
    """Of the needles that stand before the last `window` tokens."""
    arms = list(dict.fromkeys(row["arm"] for row in found))
    found = [row for row in found if (1 - row["depth"]) * row["length"] > window]
    rows = []
    for kind, length in dict.fromkeys((row["kind"], row["length"]) for row in found):
        cells = []
        for arm in arms:
            own = [r for r in found if (r["kind"], r["length"], r["arm"]) == (kind, length, arm)]
            right, nats = (np.mean([row[key] for row in own]) for key in ("answers", "nats"))
            cells.append(f"{100 * right:.0f}% ({nats:.2f})")
        rows.append([f"{kind}, {length:,}", *cells])
    what = f"whole answers right (nats a token of them), needles more than {window} tokens back"
    return what + "\n\n" + lines_of(["retrieval", *arms], rows)


def harness_table(found: dict[str, Any]) -> str:
    arms = list(found)
    names = [
        (task, name)
        for task, figures in found[arms[0]].items()
        for name in figures
        if not name.partition(",")[0].endswith("_stderr")
    ]
    rows = [
        [
            f"{task} {name.removesuffix(',none')}",
            *(f"{found[arm][task].get(name, math.nan):.4f}" for arm in arms),
        ]
        for task, name in names
    ]
    return lines_of(["task", *arms], rows)


def smoothed(nats: Any) -> tuple[Any, Any]:
    """(positions, running mean) of a difference of losses by position."""
    with np.errstate(invalid="ignore"):
        mean = np.convolve(nats, np.ones(SMOOTH) / SMOOTH, "valid")
    return np.arange(len(mean)) + SMOOTH // 2, mean


def draw(texts: dict[str, Any], window: int, path: Path) -> None:
    """Draw loss differences by position, smoothed: every arm minus full attention, and below, if
    there are controls, the memory minus each control."""
    arms = list(next(iter(texts.values()))["by_position"])
    others = [arm for arm in arms if arm != "full"]
    controls = [arm for arm in others if arm not in ("window", "memory")]
    rows = [(others, "full", "nats above full attention")]
    if controls:
        rows.append((controls, "memory", "memory less control, nats"))
    size = 5.5 * len(texts), 0.4 + 3.2 * len(rows)
    figure, grid = plt.subplots(
        len(rows), len(texts), figsize=size, layout="constrained", squeeze=False
    )
    for column, (text, part) in enumerate(texts.items()):
        curves = {arm: np.array(nats) for arm, nats in part["by_position"].items()}
        for axes, (drawn, base, label) in zip(grid[:, column], rows, strict=True):
            sign = 1 if base == "full" else -1
            for arm in drawn:
                with np.errstate(invalid="ignore"):  # inf less inf
                    over = sign * (curves[arm] - curves[base])
                colour = COLOURS[others.index(arm) % len(COLOURS)]
                axes.plot(*smoothed(over), color=colour, label=arm)
            axes.axhline(0, color="0.5", linewidth=0.8)
            axes.axvline(window, color="0.5", linewidth=0.8, linestyle="--")
            axes.set_ylabel(label)
            axes.legend(fontsize=8, frameon=False)
            tidy(axes)
        grid[0, column].set_title(f"{text} ({part['files']} files)", fontsize=9)
        grid[-1, column].set_xlabel("position, tokens (dashed: window)")
    figure.savefig(path, dpi=120)
    plt.close(figure)
