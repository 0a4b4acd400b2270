"""Which code ran: versions of what computes, and the commit of layerzoo."""

from __future__ import annotations

import functools
import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = ("layerzoo", "torch", "lightning", "torchmetrics", "numpy")


def versions() -> dict[str, str | None]:
    """Of layerzoo (its commit too, if it is known), of what it runs on, and of Python."""
    found: dict[str, str | None] = {name: metadata.version(name) for name in PACKAGES}
    return {**found, "python": platform.python_version(), "commit": commit()}


@functools.cache
def commit() -> str | None:
    """The commit that layerzoo runs from: of its checkout (with + for uncommitted changes), or the
    one that it was installed from; None if neither is known."""
    if text := metadata.distribution("layerzoo").read_text("direct_url.json"):
        installed = json.loads(text).get("vcs_info", {}).get("commit_id")
        if installed is not None:
            return installed
    # Tracked: a package that is installed below someone else's repository is not.
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    head, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "-uno")
    return head and head + ("+" if changes else "")


def _git(*words: str) -> str | None:
    """What git says here; None if it fails, or is not there."""
    try:
        answer = subprocess.run(
            ("git", *words), cwd=Path(__file__).parent, capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
