"""What is installed is what is in the tree; the README says what the code does."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import yaml

import layerzoo
from layerzoo.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
FOLDERS = ("layerzoo", "memories", "attention", "kernels", "ablations")


def test_the_wheel_holds_the_tree(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "runs", "tests")
    shutil.copytree(ROOT, source, ignore=ignored)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    done = subprocess.run([*build, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    packed = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    tree = {
        path.relative_to(source).as_posix()
        for folder in FOLDERS
        for path in (source / folder).rglob("*")
        if path.suffix in (".py", ".yaml")
    }
    assert packed == {n if n.startswith("layerzoo/") else f"layerzoo/{n}" for n in tree}


def test_the_page_of_the_layers_is_as_the_command_writes_it(tmp_path: Path) -> None:
    page = tmp_path / "layers.md"
    assert main(["list", "--write", str(page)]) == 0
    written = page.read_text() == (ROOT / "docs" / "layers.md").read_text()
    assert written, "docs/layers.md is older; run: layerzoo list --write docs/layers.md"


def test_the_readme_names_files_that_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text())
    for link in links:
        assert link.startswith("http") or (ROOT / link).exists(), link


def test_the_workflow_runs_commands_that_exist() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    targets = {line.partition(":")[0] for line in (ROOT / "Makefile").read_text().splitlines()}
    made = {words[1] for run in runs if (words := run.split())[0] == "make"}
    assert made and made <= targets
    called = re.findall(r'bin/layerzoo" (\w+)', " ".join(runs))
    assert {*called} <= {*COMMANDS} and "check" in called


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == project["version"] == layerzoo.__version__
    assert citation["license"] == project["license"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()
