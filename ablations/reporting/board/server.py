"""`layerzoo ablate board DIR`: serves grids in TensorBoard."""

from __future__ import annotations

import threading
from pathlib import Path
from urllib.parse import quote

from tensorboard.program import TensorBoard, TensorBoardServerException

from layerzoo.spec import SpecError

from ..findings import read_findings
from ..page import markdown_page
from ..plots import figures_by_name, report_plots
from ..results import read_all_results
from .hparams import write_hparams
from .summary_run import SUMMARY_FOLDER, write_summary_run

RUNS_SHOWN = 40
"""Of more runs TensorBoard shows none until they are picked."""


def serve_board(root: Path, host: str, port: int | None) -> int:
    """Write the summary of a grid's folder, or of all grids' folders in a folder, anew, and serve
    TensorBoard on it until ^C. Returns the exit status, 0.

    port: default 6006, or the next one that is free.

    Raises:
        SpecError: no grid has run there; or it cannot listen there.
    """
    grids = read_all_results(root)
    write_hparams(grids, root)
    for grid in grids:
        if grid.cells:  # some arms are tuned
            findings = read_findings(grid.root)
            write_summary_run(
                grid, figures_by_name(report_plots(findings)), markdown_page(findings, {})
            )
    url = _launch_server(root, host, port)
    at = f"^{SUMMARY_FOLDER}/" if grids[0].root == root else f"^[^/]+/{SUMMARY_FOLDER}/"
    runs = sum(1 for grid in grids for _ in (grid.root / SUMMARY_FOLDER).rglob("events.*"))
    print(f"TensorBoard: {url}")
    print(f"over seeds:  {_margins_url(url, at if runs <= RUNS_SHOWN else f'{at}[^/]+$')}")
    if any(grid.report.by for grid in grids):
        print(f"by axis:     {_margins_url(url, f'{at}[^/]+/')}")
    print("^C stops it", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print()
    return 0


def _margins_url(url: str, runs: str) -> str:
    """The address of the margin charts of the runs that match."""
    runs = quote(runs, safe="")
    return f"{url}?runFilter={runs}#custom_scalars&regexInput={runs}"


def _launch_server(root: Path, host: str, port: int | None) -> str:
    """Start the server, in a thread of its own. Returns its address."""
    where = () if port is None else ("--port", str(port))
    program = TensorBoard()
    program.configure(("tensorboard", "--logdir", str(root), "--host", host, *where))
    try:
        return program.launch()
    except TensorBoardServerException as error:
        raise SpecError(" ".join(error.msg.split())) from None  # names the host or the port
