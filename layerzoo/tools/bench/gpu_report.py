"""`layerzoo bench gpu --report`: the tables and the picture of what was measured on GPUs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from layerzoo.spec import SpecError
from layerzoo.support.arguments import spec_of
from layerzoo.support.json_files import read_figures
from layerzoo.support.plot_style import COLOURS, MARKERS, tidy

from .command import label_of
from .report import digits
from .run import OURS

BEGIN, END = "<!-- figures -->\n", "<!-- end of figures -->\n"
Rows = list[dict[str, Any]]


def write(folder: Path, page: Path, table: Mapping[str, Mapping[str, Any]]) -> None:
    """Put the tables of all files of a folder, and a picture of each, into a page; what `table`
    times besides is said to be missing.

    Raises:
        SpecError: no files, or a page without the place for them.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise SpecError(f"{folder}: no figures; run `layerzoo bench gpu` on a machine with a GPU")
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise SpecError(f"{page}: has no place for the figures, '{BEGIN.strip()}'")
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    parts = [part for file in files for part in of_gpu(file, page.parent, table)]
    page.write_text(
        before + BEGIN + "\n" + "\n\n".join(parts) + "\n\n" + END + after, encoding="utf-8"
    )


def of_gpu(file: Path, root: Path, wanted: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    found = read_figures(file)
    benchmarks = [one for one in found["benchmarks"] if "failed" not in one]
    machine = benchmarks[0]["machine"]
    versions = benchmarks[0]["versions"]
    gemm, copy = machine["gemm_gflops"] / 1e3, machine["copy_bytes_per_second"] / 1e12
    yield f"### {found['gpu']}"
    yield (
        f"torch {versions['torch']}; matrix product {gemm:.0f} TFLOP/s, copy {copy:.2f} TB/s. "
        f"Cells: ms of ours (in brackets the peer's time over ours)."
    )
    picture = file.with_suffix(".svg")
    if draw(found["gpu"], benchmarks, picture):
        yield f"![times against peers]({picture.relative_to(root)})"
    titles = list(dict.fromkeys(one["name"] for one in found["benchmarks"]))
    for title in titles:
        rows = [row for one in benchmarks if one["name"] == title for row in one["rows"]]
        if rows:
            yield f"**{title}**\n\n" + table(rows)
        for one in found["benchmarks"]:
            if one["name"] == title:
                notes = [one["failed"]] if "failed" in one else one["skipped"]
                yield from (f"- {note}" for note in notes)
    if lines := list(missing(benchmarks, wanted)):
        yield "**not measured yet**\n\n" + "\n".join(lines)


def missing(
    benchmarks: Sequence[dict[str, Any]], wanted: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    """A line a benchmark that is not whole: its layers and lengths without a time of ours."""
    timed = {
        (one["name"], row["layer"], row["T"])
        for one in benchmarks
        for row in one["rows"]
        if row["impl"] == OURS and row["ms"]
    }
    for title, fields in wanted.items():
        lengths = [int(T) for T in str(fields["lengths"]).split(",")]
        absent = {
            label: left
            for label in map(label_of, map(spec_of, fields["names"]))
            if (left := [T for T in lengths if (title, label, T) not in timed])
        }
        if absent:
            lines = (
                label if left == lengths else f"{label} ({', '.join(map(short, left))})"
                for label, left in absent.items()
            )
            yield f"- {title}: {', '.join(lines)}"


def table(rows: Rows) -> str:
    """A line a layer and measure, a column a length."""
    lengths = sorted({row["T"] for row in rows})
    peers = [name for name in dict.fromkeys(row["impl"] for row in rows) if name != OURS]
    head = ["layer", "measure", *map(short, lengths), "% of roof", "% of peak", "peak MiB"]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for layer, measure in dict.fromkeys((row["layer"], row["measure"]) for row in rows):
        mine = [row for row in rows if (row["layer"], row["measure"]) == (layer, measure)]
        ours = {row["T"]: row for row in mine if row["impl"] == OURS and row["ms"]}
        cells = [cell(T, ours, [row for row in mine if row["T"] == T]) for T in lengths]
        last = ours.get(max(ours, default=0), {})
        shares = (last.get("roof_fraction"), last.get("gemm_fraction"))
        peak = last.get("peak")
        lines.append(
            [
                layer,
                measure,
                *cells,
                *("-" if share is None else f"{100 * share:.0f}" for share in shares),
                "-" if peak is None else f"{peak / 2**20:.0f}",
            ]
        )
    note = f"Beside: {', '.join(peers)}. " if peers else ""
    note += "The last columns are of the longest T."
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{note}"


def cell(T: int, ours: dict[int, dict[str, Any]], rows: Rows) -> str:
    if T not in ours:
        return "-"
    ratios = [
        f"{row['impl']} {row['ratio']['median']:.2f}"
        for row in rows
        if row["impl"] != OURS and row["ratio"]
    ]
    return digits(ours[T]["ms"]["median"]) + (f" ({', '.join(ratios)})" if ratios else "")


def short(T: int) -> str:
    return f"{T // 1024}k" if T % 1024 == 0 else str(T)


def draw(gpu: str, benchmarks: Sequence[dict[str, Any]], path: Path) -> bool:
    """Peers' time over ours against T, a panel a benchmark and measure; False if there is none."""
    panels: dict[tuple[str, str, str], dict[str, list[tuple[int, float]]]] = {}
    for one in benchmarks:
        for row in one["rows"]:
            if row["ratio"] and not row["yardstick"] and row["measure"] != "decode":
                panel = panels.setdefault((one["name"], row["measure"], row["impl"]), {})
                panel.setdefault(row["layer"], []).append((row["T"], row["ratio"]["median"]))
    panels = {
        key: lines
        for key, lines in panels.items()
        if any(len(points) > 1 for points in lines.values())
    }
    if not panels:
        return False
    columns = 2
    count = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        count, columns, figsize=(11, 2.9 * count), layout="constrained", squeeze=False
    )
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    for axes, ((title, measure, peer), lines) in zip(grid.flat, panels.items(), strict=False):
        for n, (layer, points) in enumerate(lines.items()):
            T, ratio = zip(*sorted(points), strict=True)
            colour, marker = COLOURS[n % len(COLOURS)], MARKERS[n % len(MARKERS)]
            axes.plot(T, ratio, color=colour, marker=marker, label=layer)
        axes.axhline(1, color="0.5", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(
            FixedLocator(sorted({t for p in lines.values() for t, _ in p}))
        )
        axes.xaxis.set_major_formatter(FuncFormatter(lambda t, _: short(int(t))))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(f"{title}: {measure}", fontsize=9)
        axes.set_ylabel(f"time of {peer} / ours")
        axes.set_xlabel("T, tokens a sequence")
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        tidy(axes)
    figure.suptitle(gpu, fontsize=11)
    figure.savefig(path)
    plt.close(figure)
    return True
