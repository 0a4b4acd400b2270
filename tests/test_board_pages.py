"""TensorBoard's pages of a grid, in a browser: only there a mistyped tag shows."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium"),
]

# What is on the page, in its shadow roots too; and the lines and bands of its charts.
PAGE = """(() => {
  const texts = [], shapes = [];
  const walk = node => {
    if (node.nodeType === Node.TEXT_NODE) texts.push(node.data.trim());
    if (node.nodeName === "path" && node.getAttribute("d"))
      shapes.push(node.getAttribute("class"));
    for (const child of [...(node.shadowRoot?.childNodes ?? []), ...node.childNodes])
      if (!["SCRIPT", "STYLE", "TEMPLATE"].includes(child.nodeName)) walk(child);
  };
  walk(document.body);
  return [texts.filter(text => text).join("\\n"), shapes];
})()"""


class Browser:
    """Speaks the DevTools protocol over a pipe."""

    def __init__(self, profile: Path) -> None:
        commands, self.write = os.pipe()
        read, answers = os.pipe()
        flags = "--headless=new --no-sandbox --disable-gpu --remote-debugging-pipe"
        line = f"exec {CHROMIUM} {flags} --user-data-dir={profile} 3<&{commands} 4>&{answers}"
        self.process = subprocess.Popen(
            ["bash", "-c", line], pass_fds=(commands, answers), stderr=subprocess.DEVNULL
        )
        os.close(commands)
        os.close(answers)
        self.answers, self.calls = os.fdopen(read, "rb"), 0
        self.session: dict[str, str] = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        size = {"width": 1400, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.calls += 1
        message = {"id": self.calls, "method": method, "params": params, **self.session}
        os.write(self.write, json.dumps(message).encode() + b"\0")
        read = bytearray()
        while byte := self.answers.read(1):
            if byte != b"\0":
                read += byte
                continue
            answer = json.loads(read)
            if answer.get("id") == self.calls:
                return answer["result"]
            read.clear()
        raise AssertionError("the browser is gone")

    def open(self, url: str, texts: Sequence[str], bands: int) -> tuple[str, list[str]]:
        """A page's text and the classes of its shapes, once it has these, or after a minute."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)
        found: Any = ["", []]
        for _ in range(120):
            answer = self.call("Runtime.evaluate", expression=PAGE, returnByValue=True)
            found = answer["result"].get("value", found)
            if all(t in found[0] for t in texts) and found[1].count("area") >= bands:
                break
            time.sleep(0.5)
        return found

    def close(self) -> None:
        self.call("Browser.close")
        self.process.wait(30)
        self.answers.close()
        os.close(self.write)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def links(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What `layerzoo ablate board` says of a grid of two arms and two seeds; it ends well
    on ^C."""
    folder = tmp_path_factory.mktemp("runs")
    layer = "model.network.layers"
    tiny = {
        "name": "tiny",
        "base": "mqar",
        "budget": 4,
        "seeds": [0, 1],
        "set": {
            "data.init_args": {"vocab_size": 32, "length": 32, "pairs": 4, "batch_size": 8},
            "model.network.dim": 16,
            "trainer.val_check_interval": 2,
            "trainer.limit_val_batches": 1,
            "trainer.limit_test_batches": 1,
        },
        "axes": {
            "layer": {
                "window": {layer: [{"name": "sliding", "heads": 2, "window": 8}]},
                "memory": {layer: [{"name": "linear", "heads": 2}]},
            }
        },
        "window_arm": {"layer": "window"},
        "report": {"by": ["layer"]},
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump(tiny))
    ablate = [sys.executable, "-m", "layerzoo", "ablate"]
    ran = [*ablate, "run", str(folder / "grid.yaml"), "--out", str(folder), "--jobs", "1"]
    subprocess.run(ran, check=True, stdout=subprocess.DEVNULL)
    board = subprocess.Popen(
        [*ablate, "board", str(folder / "tiny"), "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    assert board.stdout is not None
    try:
        lines = iter(board.stdout.readline, "^C stops it\n")
        yield dict(line.rstrip().split(": ", 1) for line in lines if line)
    finally:
        board.send_signal(signal.SIGINT)
        assert board.wait(60) == 0
        board.stdout.close()


# The link to open and what comes after it; what the page says; how many bands its charts have.
PAGES = (
    ("over seeds", "", ("mean/recall/accuracy (summary/memory)", "summary/window"), 4 * 3),
    ("by axis", "", ("mean/by_layer/loss/held_out (summary/by_layer/window)",), 2 * 3),
    ("TensorBoard", "#hparams", ("test/recall/accuracy", "seed", "layer", "window"), 0),
    ("TensorBoard", "#images", ("all arms/", "summary"), 0),
    ("TensorBoard", "#text", ("all arms/results", "beyond window", "memory"), 0),
    ("TensorBoard", "#timeseries", ("all arms", "mean", "summary/memory"), 0),
)


@pytest.mark.parametrize(("link", "page", "texts", "bands"), PAGES)
def test_page(
    browser: Browser,
    links: dict[str, str],
    link: str,
    page: str,
    texts: tuple[str, ...],
    bands: int,
) -> None:
    text, shapes = browser.open(links[link].strip() + page, texts, bands)
    assert [wanted for wanted in texts if wanted not in text] == []
    assert shapes.count("area") == bands
