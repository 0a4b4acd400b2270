"""The figures of a grid's report, and the scaling laws in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from layerzoo.ablations.reporting import scaling as laws
from layerzoo.ablations.reporting.findings import read_findings
from layerzoo.ablations.reporting.page import markdown_page
from layerzoo.ablations.reporting.plots import report_plots
from layerzoo.ablations.reporting.plots.canvas import arm_styles, legend_styles, wrapped
from layerzoo.ablations.reporting.report_files import summary_tree
from layerzoo.ablations.reporting.scaling import fit_scaling

WriteResults = Callable[..., Path]
WINDOW = {"layer": {"window": {}, "memory": {}}}


def drawn(root: Path) -> dict[str, Figure]:
    return {name: picture.figure for name, picture in report_plots(read_findings(root)).items()}


def laid_out(figure: Figure) -> Any:
    """The renderer, after the layout has been computed."""
    canvas = FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    return canvas.get_renderer()


@pytest.fixture
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit has 20 resamples instead of 200: no test here judges how wide an interval is."""
    monkeypatch.setattr(laws, "fit_scaling", partial(fit_scaling, resamples=20))


def test_curves_are_means_over_seeds_with_intervals(write_results: WriteResults) -> None:
    def measured(arm: dict[str, str], seed: int) -> dict[str, float]:
        best = 0.9 if arm["layer"] == "memory" else 0.2
        lags = {f"recall_lag/{lag}": best - 0.1 * seed for lag in (1, 2, 4, 16)}
        return {"recall/accuracy": best, "recall/queries": 9.0, **lags}

    root = write_results(measured, axes=WINDOW, data={"reach": 9}, seeds=[0, 1])
    figure = drawn(root)["recall_lag-lag"]
    (axes,) = figure.axes
    window, memory, reach = axes.lines
    assert [*memory.get_xdata()] == [1, 2, 4, 16]
    assert memory.get_ydata() == pytest.approx([0.85] * 4)
    assert window.get_ydata() == pytest.approx([0.15] * 4)
    # ±12.706 x .0707 / sqrt 2, the interval of two seeds .1 apart.
    _, band = axes.collections
    edges = band.get_paths()[0].vertices[:, 1]
    assert (edges.min(), edges.max()) == pytest.approx((0.85 - 0.6353, 0.85 + 0.6353), abs=1e-3)
    assert reach.get_xdata()[0] == 8.5  # the value is one nearer than its key
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert ticks == ["1", "2-3", "4-7", "16-31"]


def test_arms_without_a_curve_take_no_panel(write_results: WriteResults) -> None:
    """Of 10 tasks two have lags."""

    def measured(arm: dict[str, str], seed: int) -> dict[str, float]:
        figures = {"recall/accuracy": 0.5}
        lags = {f"recall_lag/{lag}": 0.5 for lag in (1, 2, 4)}
        return {**figures, **lags} if arm["task"] in ("t2", "t7") else figures

    axes = {"task": {f"t{n}": {} for n in range(10)}, **WINDOW}
    figure = drawn(write_results(measured, axes=axes, seeds=[0, 1]))["recall_lag-lag"]
    shown = [[line.get_label() for line in panel.lines] for panel in figure.axes]
    assert shown == [["t2,window", "t2,memory", "t7,window", "t7,memory"]]


def test_parts_of_a_task_are_drawn_for_the_figures_of_the_table(
    write_results: WriteResults,
) -> None:
    def measured(arm: dict[str, str], seed: int) -> dict[str, float]:
        out = {"recall/accuracy": 0.5, "loss/held_out": 1.0}
        for length in (64, 128, 256):
            out |= {f"{name}/length={length}": 64 / length for name in ("recall/accuracy", "x/y")}
            out |= {f"recall_depth/{depth}/length={length}": 0.01 * depth for depth in (0, 50, 99)}
        return out | {f"recall/accuracy/task={j}": 0.1 * j for j in (1, 2)}

    figures = drawn(write_results(measured, axes=WINDOW))
    assert {*figures} == {"overview", "recall-accuracy-length", "recall_depth-depth-and-length"}
    panels = figures["recall_depth-depth-and-length"].axes
    assert [axes.get_title() for axes in panels] == ["length 64", "length 128", "length 256"]


def test_continual_matrices(write_results: WriteResults) -> None:
    def measured(arm: dict[str, str], seed: int) -> dict[str, float]:
        out = {"accuracy/all": 0.5, "continual/backward_transfer": -0.2 - 0.1 * seed}
        for phase in range(3):
            for task in (1, 2):
                out[f"continual_matrix/phase={phase}/task={task}"] = 0.1 * phase + 0.02 * seed
        return out | {"continual/forgetting_max_minus_last/task=1": 0.7}

    root = write_results(measured, axes=WINDOW)
    findings = read_findings(root)
    drawings = report_plots(findings)
    figure = drawings["continual_matrix"].figure
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["window", "memory"]
    values = panels[0].images[0].get_array()
    assert np.allclose(values, [[0.02, 0.02], [0.12, 0.12], [0.22, 0.22]])
    text = markdown_page(findings, drawings)
    assert "| arm | backward_transfer (%) |" in text and "| window | -30.0 ±24.8 |" in text
    assert "figures/continual_matrix.svg" in text and "continual_matrix-" not in text


def many(options: int) -> dict[str, dict[str, Any]]:
    names = ("window", "memory", "window_and_memory_in_parallel", "full_attention", "reset")
    return {
        "layer": {name: {} for name in names},
        "forgetting": {f"forgetting_{n}_of_many": {} for n in range(options)},
    }


@pytest.mark.parametrize("options", [1, 8])
def test_names_are_whole_and_cover_no_data(write_results: WriteResults, options: int) -> None:
    """Of 5 arms and of 40."""

    def measured(arm: dict[str, str], seed: int) -> dict[str, float]:
        size = 64 * len(arm["layer"])
        lags = {f"recall_lag/{lag}": 0.5 for lag in (1, 2, 4)}
        return {"recall/accuracy": 0.5 + 0.1 * seed, "chance": 0.1, "state_bytes": size, **lags}

    findings = read_findings(write_results(measured, axes=many(options)))
    figures = {name: picture.figure for name, picture in report_plots(findings).items()}
    arms = [wrapped(row.arm) for row in findings.rows]
    assert len(arms) == 5 * options
    assert {name for name in figures if name != "axes"} == {"overview", "recall_lag-lag", "state"}
    labels = [label.get_text() for label in figures["overview"].axes[0].get_yticklabels()]
    assert labels == arms
    told = []
    for name, figure in figures.items():
        renderer = laid_out(figure)
        for axes in (axes for axes in figure.axes if axes.get_label() != "<colorbar>"):
            box = axes.get_tightbbox(renderer)
            assert box is not None and box.x0 >= 0 and box.x1 <= figure.bbox.x1, name
            assert axes.get_window_extent().width > 200, name
            if legend := axes.get_legend():
                assert legend.get_window_extent(renderer).x0 >= axes.get_window_extent().x1
                names = [text.get_text() for text in legend.get_texts()]
                told += names if name == "recall_lag-lag" else []
        if name == "recall_lag-lag":
            assert len(figure.axes) == (1 if options == 1 else 5)
    assert told == arms
    assert len({*arm_styles(findings.rows).values()}) == 5 * options
    assert len(legend_styles(findings.rows)) == (5 if options == 1 else 5 + 8)


def test_the_overview_shows_the_bound_of_each_arm(write_results: WriteResults) -> None:
    def measured(arm: dict[str, str], seed: int) -> dict[str, float]:
        ceiling = 0.4 if arm["layer"] == "window" else 1.0
        return {
            "recall/accuracy": 0.3,
            "recall/ceiling": ceiling,
            "recall/queries": 99,
            "chance": 0.1,
        }

    figures = drawn(write_results(measured, axes=WINDOW))
    assert {*figures} == {"overview"}  # equal states are no figure
    (axes,) = figures["overview"].axes
    lines = {collection.get_label(): collection for collection in axes.collections}
    bounds, chances = lines["most that the window allows"], lines["chance"]
    # .4 + .6 x .1 for the window; the other can see all.
    xs = [segment[0][0] for segment in bounds.get_segments() if len(segment)]
    assert xs == pytest.approx([0.46])
    assert [segment[0][0] for segment in chances.get_segments()] == pytest.approx([0.1, 0.1])


def capacities(arm: dict[str, str], seed: int) -> dict[str, float]:
    """y = 2 x^.5 with noise of 1%, for sizes 2^4 to 2^12; of rule b the three largest are beyond
    what was tested, and the smallest below it. Rule c has one size."""
    size = 2 ** int(arm["size"])
    noise = np.random.default_rng([seed, size]).normal()
    found = 2 * size**0.5 * float(np.exp(0.01 * noise))
    if arm["rule"] == "b":
        found = {4: 0.0, 10: 200.0, 11: 200.0, 12: 200.0}.get(int(arm["size"]), found)
    tested = {"accuracy_pairs/4": 0.99, "accuracy_pairs/200": 0.91}
    return {"accuracy/all": 0.5, "capacity/d90": found, "state_bytes": size, **tested}


@pytest.mark.usefixtures("fewer_resamples")
def test_scaling_laws_by_group(write_results: WriteResults) -> None:
    axes = {
        "rule": {"a": {}, "b": {}, "c": {}},
        "size": {str(n): {} for n in range(4, 13)},
    }
    law = {"y": "capacity/d90", "x": ["state_bytes"], "by": ["rule"], "rises": True}
    root = write_results(
        capacities,
        axes=axes,
        seeds=[0, 1],
        exclude=[{"rule": "c", "size": [str(n) for n in range(5, 13)]}],
        report={"scaling": [law]},
    )
    findings = read_findings(root)
    drawings = report_plots(findings)
    text = markdown_page(findings, drawings)
    a, b, c = summary_tree(findings)["scaling"]
    assert (a["cells"], a["left_out"], a["refused"]) == (18, {}, None)
    assert text.count(", best |") == 1 + (b["best"] is not None)
    value, low, high = a["forms"][a["best"]]["parameters"]["a"]
    assert low <= 0.5 <= high and value == pytest.approx(0.5, abs=0.03)
    assert f"| a | {a['best']}, best |" in text and f"a = {value:.3g} ({low:.3g} to" in text
    assert b["cells"] == 10 and sorted(b["left_out"].values()) == [2, 6]
    assert "- b: 6 cells left out: capacity/d90 is the largest that was tested, or more." in text
    assert "- b: 2 cells left out: capacity/d90 is below the smallest that was tested." in text
    # 2^5 to 2^9 are 1.2 decades, and one size none: no exponent, and no line.
    for group in (b, c):
        assert group["refused"] and all(not f["parameters"] for f in group["forms"].values())
        assert f"- {group['group']}: no exponent: {group['refused']}." in text
    (panel,) = drawings["scaling-1"].figure.axes
    curves = [line for line in panel.lines if len(line.get_xdata()) == 100]
    assert len(curves) == 1 and len(panel.collections) == 1
    apart = [line for line in panel.lines if line.get_markerfacecolor() == "white"]
    assert [len(line.get_xdata()) for line in apart] == [2, 2, 2]  # both seeds of the largest size


@pytest.mark.usefixtures("fewer_resamples")
def test_a_law_of_two_sizes_is_drawn_as_measured_against_fitted(
    write_results: WriteResults,
) -> None:
    def measured(arm: dict[str, str], seed: int) -> dict[str, float]:
        n, d = (10 ** float(arm[axis]) for axis in ("n", "d"))
        noise = np.exp(0.003 * np.random.default_rng([seed, int(n), int(d)]).normal())
        loss = 1.69 + 406.4 * n**-0.34 + 410.7 * d**-0.28
        return {"loss/held_out": loss * noise, "parameters": n, "steps": d}

    axes = {"n": {str(k): {} for k in (4, 4.5, 5, 5.5, 6)}, "d": {str(k): {} for k in (5, 6, 7)}}
    law = {"y": "loss/held_out", "x": ["parameters", "steps"]}
    root = write_results(
        measured, axes=axes, seeds=[0, 1], report={"metric": "loss/held_out", "scaling": [law]}
    )
    findings = read_findings(root)
    (fit,) = findings.laws
    assert fit.x.shape == (30, 2) and fit.scaling is not None
    assert fit.x.max(0) == pytest.approx((1e6, 1e7))  # parameters, steps
    assert fit.scaling.refused is None
    used, apart, _ = report_plots(findings)["scaling-1"].figure.axes[0].lines
    largest = (fit.x == fit.x.max(0)).any(1)
    for line, some in ((used, ~largest), (apart, largest)):
        assert np.array_equal(line.get_ydata(), fit.y[some])
        assert np.array_equal(line.get_xdata(), fit.scaling.best.predict(fit.x)[some])
    json.dumps(summary_tree(findings), allow_nan=False)


def test_a_law_without_its_figure_is_refused_in_words(write_results: WriteResults) -> None:
    law = {"y": "capacity/d91", "x": ["state_bytes"]}
    root = write_results(
        lambda arm, seed: {"accuracy/all": 0.5}, axes=WINDOW, report={"scaling": [law]}
    )
    findings = read_findings(root)
    text = markdown_page(findings, report_plots(findings))
    assert "- capacity/d91: 6 cells left out: no capacity/d91." in text
    assert "- capacity/d91: no exponent: no cell to fit." in text
    assert "scaling-1" not in text
