"""The report of a grid: what its files say, against figures computed by hand."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas
import pytest
from rich.console import Console

from layerzoo import SpecError
from layerzoo.ablations.command import main
from layerzoo.ablations.reporting.arm_rows import is_share
from layerzoo.ablations.reporting.formats import escape_markdown, estimate_text, p_text
from layerzoo.ablations.reporting.report_files import compare
from layerzoo.ablations.reporting.statistics import Estimate
from layerzoo.ablations.reporting.tables import without_folders

from .extras import need

WriteResults = Callable[..., Path]
T3 = 4.302652729911275
"""Student's t, 97.5%, 2 degrees of freedom."""


def report(root: Path, to: Path | None = None) -> tuple[str, str]:
    """The text of report.md, and what the terminal shows."""
    return judged(root, to)[:2]


def judged(root: Path, to: Path | None = None) -> tuple[str, str, bool]:
    """The same, and what `compare` returns."""
    screen = io.StringIO()
    holds = compare(root, Console(file=screen, width=200), to)
    return ((to or root / "report") / "report.md").read_text(), screen.getvalue(), holds


def lines(text: str, after: str = "") -> list[list[str]]:
    """The first table after a heading or text, cell by cell."""
    rows: list[list[str]] = []
    for line in text[text.index(after) :].splitlines():
        if line.startswith("| "):
            rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
        elif rows:
            break
    return [rows[0], *rows[2:]]


def recall(arm: dict[str, str], seed: int) -> dict[str, float]:
    """Window .30 .40 .50, memory .92 .90 .94; half of the queries are in the window's reach."""
    accuracy = (0.3 + 0.1 * seed) if arm["layer"] == "window" else (0.92, 0.90, 0.94)[seed]
    curve = {f"recall_lag/{2**n}": accuracy - 0.01 * n for n in range(5)}
    figures = {"recall/accuracy": accuracy, "recall/ceiling": 0.5, "recall/queries": 2500.0}
    figures |= {"recall/beyond_window": accuracy / 2, "chance": 0.1, "loss/held_out": 1 - accuracy}
    size = {"state_bytes": 64 if arm["layer"] == "window" else 4096}
    return {**figures, **curve, **size, "errors/stale_rate": 0.1 * seed}


LAYERS = {"layer": {"window": {}, "memory": {}}}
CONTRAST = {"contrasts": [["memory", "window"]], "columns": ["errors/stale_rate"]}


@pytest.fixture
def whole(write_results: WriteResults) -> Path:
    """A finished grid."""
    return write_results(recall, axes=LAYERS, data={"reach": 9}, report=CONTRAST)


class Reported(NamedTuple):
    """A grid's folder, with its report, the report's text, and what the terminal showed."""

    root: Path
    text: str
    screen: str


@pytest.fixture(scope="module")
def kept() -> list[Reported]:
    """The report of the finished grid, once there is one."""
    return []


@pytest.fixture
def reported(
    request: pytest.FixtureRequest, kept: list[Reported], tmp_path_factory: pytest.TempPathFactory
) -> Reported:
    """The finished grid with its report, which the tests share: they only read it."""
    if not kept:
        whole: Path = request.getfixturevalue("whole")
        root = whole.rename(tmp_path_factory.mktemp("reported") / "grid")
        kept.append(Reported(root, *report(root)))
    return kept[0]


@pytest.fixture
def copied(reported: Reported, tmp_path: Path) -> Path:
    """A copy of it, which a test may change."""
    return shutil.copytree(reported.root, tmp_path / "copied")


def test_a_finished_grid(reported: Reported) -> None:
    _, text, screen = reported
    assert text.startswith(
        "# grid\n\nDoes it remember?\n\n6 cells (6 finished): 2 arms, seeds 0, "
    )
    assert "500 updates each; task MQAR; cpu; layerzoo 0.1.0, torch 2.13.0" in text
    assert "commit aaaaaaaaaaaa; 6 min of training" in text and "Partial" not in text
    heads, window, memory = lines(text, "## Results")
    assert heads[:4] == ["arm", "cells", "recall/accuracy (%)", "≥90%"]
    table = dict(zip(heads, window, strict=True))
    half = 100 * T3 * 0.1 / math.sqrt(3)
    assert table["recall/accuracy (%)"] == f"40.0 ±{half:.1f}" == "40.0 ±24.8"
    assert (table["≥90%"], table["ceiling (%)"], table["chance (%)"]) == ("0/3", "50.0", "10.0")
    assert table["errors/stale_rate (%)"] == "10.0 ±24.8"
    assert (table["parameters"], table["state bytes"]) == ("1,000", "64")
    assert dict(zip(heads, memory, strict=True))["≥90%"] == "3/3"
    # .5 + .5 x .1; its standard error with 2500 queries sqrt(.55 x .45 / 2500).
    assert "guesses the rest recalls 55.0% (standard error of one run 1.0%)" in text
    assert "All 6 cells finished." in text
    assert all(word in screen for word in ("40.0 ±24.8", "memory - window", "55.0%", "report.md"))


def test_contrasts_of_the_headline_and_of_columns(reported: Reported) -> None:
    root, text, _ = reported
    # Differences .62, .50, .44: mean .52, s = .0917, t = .52 / (.0917 / sqrt 3) = 9.83.
    _, row = lines(text, "Of recall/accuracy:")
    half = 100 * T3 * np.std([0.62, 0.5, 0.44], ddof=1) / math.sqrt(3)
    assert row == ["memory - window", f"+52.0 ±{half:.1f}", "0.010", "0.010", "3", "higher"]
    _, row = lines(text, "Of errors/stale_rate:")
    assert row == ["memory - window", "+0.0 ±0.0", "1.000", "1.000", "3", "not told apart"]
    contrast = json.loads((root / "report" / "summary.json").read_text())["contrasts"]
    (found,) = contrast["recall/accuracy"]
    assert found["mean"] == pytest.approx(0.52) and found["p"] == pytest.approx(0.0102, abs=1e-4)
    assert found["words"] == "higher" and found["pairs"] == 3


def test_p_is_corrected_over_the_contrasts_of_a_figure(write_results: WriteResults) -> None:
    def measured(arm: dict[str, str], seed: int) -> dict[str, float]:
        shift = {"a": 0.0, "b": 0.2, "c": 0.1}[arm["x"]]
        wobble = {"a": 0.0, "b": 0.02, "c": 0.03}[arm["x"]] * (seed - 1)
        return {"accuracy/all": 0.5 + shift + wobble, "chance": 0.1}

    axes = {"x": {"a": {}, "b": {}, "c": {}}}
    text, _ = report(write_results(measured, axes=axes, report={"baseline": "a"}))
    _, b, c = lines(text, "## Contrasts")
    # t = 17.3 and 5.77 with 2 degrees of freedom; the smaller p counts twice.
    assert (b[2:4], c[2:4]) == (["0.003", "0.007"], ["0.029", "0.029"])
    assert (b[5], c[5]) == ("higher", "higher")


def test_ten_pairs_have_a_bootstrap_interval(write_results: WriteResults) -> None:
    def measured(arm: dict[str, str], seed: int) -> dict[str, float]:
        return {"accuracy/all": 0.5 if arm["layer"] == "window" else 0.6 + 0.01 * (seed % 5)}

    root = write_results(measured, axes=LAYERS, seeds=[*range(10)], report={"baseline": "window"})
    heads, row = lines(report(root)[0], "## Contrasts")
    low, high = map(float, row[6].split(" to "))
    assert heads[6] == "bootstrap interval" and 11 <= low < 12 < high <= 13 and row[4] == "10"


def test_a_part_of_a_grid_says_what_is_missing(write_results: WriteResults) -> None:
    def measured(arm: dict[str, str], seed: int) -> Any:
        if arm["layer"] == "window":
            return recall(arm, seed)
        return ("OSError: no /home/me/data/x.bin, (disk)", {}, None)[seed]

    root = write_results(measured, axes=LAYERS, report={"contrasts": [["memory", "window"]]})
    text, screen, holds = judged(root)
    assert (
        holds
        and "**Partial: 2 of 6 cells have no result yet.**" in text
        and "Partial: 2 of" in screen
    )
    assert "6 cells (3 finished, 1 failed, 1 diverged, 1 missing)" in text
    _, window, memory = lines(text, "## Results")
    assert window[1:3] == ["3/3", "40.0 ±24.8"]
    assert memory[1:4] == ["0/3, 1 diverged, 1 failed", "-", "-"]
    assert lines(text, "## Contrasts")[1] == ["memory - window", "-", "-", "-", "0", "-"]
    assert lines(text, "## Cells")[1:] == [
        ["memory", "0", "failed", "OSError: no x.bin, (disk)"],
        ["memory", "1", "diverged", "loss nan at step 7"],
        ["memory", "2", "missing", "-"],
    ]
    json.loads((root / "report" / "summary.json").read_text(), parse_constant=pytest.fail)  # NaN


def overflowed(arm: dict[str, str], seed: int) -> dict[str, float]:
    """The memory's figures are not finite: its loss in one seed, its perplexity in all, and in
    both directions; the window's are."""
    figures = recall(arm, seed) | {"loss/perplexity": 2.0, "text/difference": 0.5, "x": 10.0**seed}
    figures |= {"loss_at/1": 1.0, "loss_at/2": 2.0}
    if arm["layer"] == "memory":
        figures |= {"loss/held_out": (0.5, math.nan, 0.7)[seed], "loss/perplexity": math.inf}
        figures |= {"text/difference": (math.inf, -math.inf, 0.0)[seed], "x": math.inf}
        figures |= {"loss_at/1": math.inf, "loss_at/2": math.nan}
    return figures


def test_figures_that_are_not_finite_are_shown_and_judged_as_such(
    write_results: WriteResults,
) -> None:
    columns = ["loss/perplexity", "text/difference"]
    claims = [
        {"arm": "memory", "minus": "window", "metric": "loss/perplexity", "value": 1},
        {"arm": "memory", "metric": "loss/held_out", "value": 1.0, "tolerance": 9},
        {"arm": "window", "metric": "loss/perplexity", "value": 2.0, "tolerance": 0.1},
    ]
    claims[0]["tolerance"] = "sign"
    claims = [{**claim, "source": "by hand"} for claim in claims]
    asked = {"columns": columns, "contrasts": [["memory", "window"]]}
    asked |= {"metric": "loss/held_out", "scaling": [{"y": "loss/perplexity", "x": ["x"]}]}
    root = write_results(overflowed, axes=LAYERS, report=asked, expect=claims)
    text, screen, holds = judged(root)
    heads, window, memory = lines(text, "## Results")
    table = dict(zip(heads, memory, strict=True))
    assert [table[name] for name in ("loss/held_out", *columns)] == ["nan", "inf", "nan"]
    assert dict(zip(heads, window, strict=True))["loss/perplexity"] == "2 ±0"
    for name, mean in (("loss/held_out", "+nan"), ("loss/perplexity", "+inf")):
        assert lines(text, f"Of {name}:")[1] == ["memory - window", mean, "-", "-", "3", "-"]
    verdicts = [line[-2:] for line in lines(text, "## Claims")[1:]]
    assert verdicts == [["+inf", "not finite"], ["nan", "not finite"], ["2.000", "holds"]]
    assert "3 cells left out: loss/perplexity is inf" in text and "not finite" in screen
    assert not holds

    found = json.loads((root / "report" / "summary.json").read_text(), parse_constant=pytest.fail)
    arm = found["arms"][1]
    assert arm["loss/perplexity"] == {"mean": "inf", "half": None}
    assert [cell["loss/held_out"] for cell in arm["cells"]] == [0.5, "nan", 0.7]
    assert [claim["holds"] for claim in found["claims"]] == [False, False, True]
    with open(root / "report" / "results.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["arm"] == "memory"]
    assert [row["loss/held_out"] for row in rows] == ["0.5", "nan", "0.7"]
    assert {row["loss/perplexity"] for row in rows} == {"inf"}
    figures = root / "report" / "figures"
    assert "mean nan" in (figures / "overview.svg").read_text()
    assert {"inf", "nan"} <= {
        *re.findall(r">(\w+)</text>", (figures / "loss_at-position.svg").read_text())
    }


def test_nothing_has_finished(write_results: WriteResults) -> None:
    root = write_results(lambda arm, seed: None, axes=LAYERS)
    text, _ = report(root)
    assert "6 cells (6 missing)" in text and "![" not in text
    assert lines(text, "## Results")[1][:3] == ["window", "0/3", "-"]


@pytest.mark.parametrize("seeds", [[0], [0, 1]])
def test_few_seeds(write_results: WriteResults, seeds: list[int]) -> None:
    root = write_results(recall, axes=LAYERS, seeds=seeds, report=CONTRAST)
    text, _ = report(root)
    (_, window, _), (_, contrast) = lines(text, "## Results"), lines(text, "Of recall/accuracy:")
    if len(seeds) == 1:  # no interval, no test
        assert window[2] == "30.0" and contrast[1:] == ["+62.0", "-", "-", "1", "-"]
    else:  # t of one degree of freedom is 12.706
        assert window[2] == f"35.0 ±{100 * 12.7062 * 0.05:.1f}" and contrast[4] == "2"


def test_a_grid_of_losses_alone(write_results: WriteResults) -> None:
    def measured(arm: dict[str, str], seed: int) -> dict[str, float]:
        return {"loss/held_out": 2.5 + 0.1 * seed, "loss_at/1": 3.0, "loss_at/2": 2.0 + seed}

    root = write_results(measured, axes=LAYERS, report={"metric": "loss/held_out"})
    text, screen = report(root)
    heads, window, _ = lines(text, "## Results")
    assert heads == ["arm", "cells", "loss/held_out", "parameters", "state bytes"]
    assert window[2] == "2.6 ±0.25" and "window" in screen and "Ceiling" not in text
    drawn = sorted(path.stem for path in (root / "report" / "figures").iterdir())
    assert drawn == ["loss_at-position", "overview"]


def test_groups_count_seeds_and_axes_make_a_map(write_results: WriteResults) -> None:
    def measured(arm: dict[str, str], seed: int) -> dict[str, float]:
        name = "recall/accuracy" if arm["task"] == "mqar" else "accuracy/all"
        return {name: (0.8 if arm["task"] == "mqar" else 0.4) + 0.1 * seed}

    axes = {"task": {"mqar": {}, "parity": {}}, **LAYERS}
    contrasts = [{"task": ["mqar", "parity"]}]
    report_of = {"by": ["layer"], "contrasts": contrasts}
    root = write_results(measured, axes=axes, seeds=[0, 1], report=report_of)
    text, _ = report(root)
    # Tasks with another headline are pooled, too: (.8 + .4) / 2 and (.9 + .5) / 2.
    heads, window, _ = lines(text, "By layer")
    assert heads[1:3] == ["cells", "accuracy/of each task (%)"]
    assert window[:3] == ["window", "4/4", f"65.0 ±{100 * 12.7062 * 0.05:.1f}"]
    assert lines(text, "## Contrasts")[1][1] == "+40.0 ±0.0"
    svg = (root / "report" / "figures" / "axes.svg").read_text()
    assert all(f">{word}<" in svg for word in ("0.85", "0.45", "mqar", "parity", "memory"))


def test_matched_and_tuned(write_results: WriteResults) -> None:
    def about(arm: str) -> dict[str, Any]:
        found = {"window": (1000, 0.0), "memory": (960, -0.04)}[arm]
        matched = {"by": "parameters", "target": 1000, "achieved": found[0], "deviation": found[1]}
        return {"matched": matched, "tuned": {"model.lr": "lr=0.01"} if arm == "memory" else {}}

    root = write_results(recall, about=about, axes=LAYERS)
    text, _ = report(root)
    assert "Matched by parameters to 1,000; the farthest is memory, 960 (-4.0%)." in text
    assert lines(text, "Tuned")[1:] == [["window", "-"], ["memory", "lr=0.01"]]
    with open(root / "report" / "results.csv", newline="") as file:
        rows = [*csv.DictReader(file)]
    assert {row["arm"]: row["tuned:model.lr"] for row in rows} == {
        "window": "",
        "memory": "lr=0.01",
    }
    assert {row["matched:deviation"] for row in rows} == {"0.0", "-0.04"}


def test_data_has_a_line_a_cell_in_full_precision(write_results: WriteResults) -> None:
    def measured(arm: dict[str, str], seed: int) -> Any:
        return {"recall/accuracy": 1 / 3 + seed} if arm["layer"] == "window" else {}

    root = write_results(measured, axes=LAYERS, seeds=[0, 5])
    report(root)
    with open(root / "report" / "results.csv", newline="") as file:
        rows = [*csv.DictReader(file)]
    places = ["arm", "axis:layer", "seed_init", "seed_data", "state", "path", "matched:deviation"]
    names = ["length", "parameters", "recall/accuracy", "state_bytes", "steps"]
    assert [*rows[0]] == [*places, *names]
    assert [row["state"] for row in rows] == ["finished", "diverged"] * 2
    assert [row["seed_init"] for row in rows] == ["0", "0", "5", "5"]
    assert float(rows[2]["recall/accuracy"]) == 1 / 3 + 5 and rows[1]["recall/accuracy"] == ""


def test_parquet_holds_what_csv_holds(reported: Reported) -> None:
    need("pyarrow")
    frame = pandas.read_parquet(reported.root / "report" / "results.parquet")
    with open(reported.root / "report" / "results.csv", newline="") as file:
        rows = [*csv.DictReader(file)]
    assert [*frame.columns] == [*rows[0]]
    assert [*frame["recall/accuracy"]] == [float(row["recall/accuracy"]) for row in rows]


def test_claims_and_doubts(write_results: WriteResults) -> None:
    claim = {"arm": "window", "metric": "recall/accuracy", "value": 0.9, "tolerance": 0.1}
    root = write_results(
        recall,
        axes=LAYERS,
        expect=[{**claim, "source": "a guess"}],
        report={"columns": ["errors/stale"]},
    )
    record = root / "memory" / "seed-1" / "record.json"
    record.write_text(record.read_text().replace("2.13.0", "2.12.0"))
    text, _ = report(root)
    assert lines(text, "## Claims")[1][-2:] == ["0.400", "fails"]
    assert "**warning: cells ran with different torch: 2.12.0, 2.13.0**" in text
    assert "no cell measured 'errors/stale'; did you mean 'errors/stale\\_rate'?" not in text
    assert "no cell measured 'errors/stale'; did you mean 'errors/stale_rate'?" in text
    assert main(["report", str(root)]) == 1  # a claim fails


class Page(HTMLParser):
    """Notes what opens, what closes, and what is referred to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_html_is_one_file(reported: Reported) -> None:
    text = (reported.root / "report" / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert not page.open and "img" not in page.seen
    assert page.seen.count("svg") == len([*(reported.root / "report" / "figures").iterdir()]) == 3
    assert page.seen.count("table") == 4
    assert page.links and all(link.startswith(("#", "data:")) for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} <= {*page.ids}
    assert not re.search(r"@import|url\((?!#)", text)


def test_the_same_results_give_the_same_bytes_and_no_path_of_this_machine(
    reported: Reported, copied: Path, tmp_path: Path
) -> None:
    def bytes_of(folder: Path) -> dict[str, bytes]:
        files = (path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    report(copied, tmp_path / "apart")
    first, second = bytes_of(reported.root / "report"), bytes_of(tmp_path / "apart")
    assert first == second and {"summary.json", "figures/overview.svg"} <= first.keys()
    for here in (tmp_path, reported.root.parent):
        places = [name for name, content in first.items() if str(here).encode() in content]
        assert not places


def test_figures_that_are_no_longer_drawn_are_removed(copied: Path) -> None:
    figures = copied / "report" / "figures"
    (figures / "mine.svg").write_text("")  # not the report's
    for path in copied.glob("*/*/metrics.json"):
        metrics = json.loads(path.read_text())
        path.write_text(json.dumps({n: x for n, x in metrics.items() if "recall_lag" not in n}))
    report(copied)
    assert {path.stem for path in figures.iterdir()} == {"mine", "overview", "state"}


def test_a_folder_that_holds_no_results_is_named(tmp_path: Path, whole: Path) -> None:
    with pytest.raises(SpecError, match=f"{tmp_path}: is not the folder of a grid's results"):
        main(["report", str(tmp_path)])
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match=r"file.*; give another --to"):
        main(["report", str(whole), "--to", str(tmp_path / "file")])
    (whole / "cells.json").write_text("[]")
    with pytest.raises(SpecError, match="no arm is tuned yet"):
        main(["report", str(whole)])


@pytest.mark.parametrize(
    ("name", "estimate", "text"),
    [
        ("recall/accuracy", Estimate(0.98765, 0.0123), "98.8 ±1.2"),
        ("recall_lag/16", Estimate(1.0, math.nan), "100.0"),
        ("loss/held_out", Estimate(1.23456, 0.0123), "1.235 ±0.012"),
        ("capacity/d90", Estimate(16.0, 0.0), "16 ±0"),
        ("recall/half_life", Estimate(2.5, math.nan), "2.5"),
        ("accuracy/all", Estimate(math.nan, math.nan, 0), "-"),
        ("accuracy/all", Estimate(math.nan, math.nan, 2), "nan"),
        ("loss/perplexity", Estimate(math.inf, math.nan, 2), "inf"),
    ],
)
def test_figures_are_written_with_sensible_digits(
    name: str, estimate: Estimate, text: str
) -> None:
    assert estimate_text(name, estimate) == text


def test_shares_and_texts() -> None:
    shares = "accuracy/all errors/stale_rate continual/backward_transfer recall/untouched chance"
    assert all(map(is_share, shares.split()))
    others = "loss/held_out recall/queries recall/half_life_censored capacity/d90 extrapolation/2"
    assert not any(map(is_share, others.split()))
    assert [p_text(p) for p in (None, 0.0004, 0.04)] == ["-", "<0.001", "0.040"]
    assert escape_markdown("a|b *c* <d> _e_ f_g") == r"a\|b \*c\* &lt;d> \_e\_ f_g"
    assert (
        without_folders("no '/a/b-1/c.txt' or /d, 1/2, x://y/z")
        == "no 'c.txt' or /d, 1/2, x://y/z"
    )
