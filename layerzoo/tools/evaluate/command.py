"""`layerzoo evaluate`: a converted model beside the model that it was made of, its window alone,
and controls: loss by position, retrieval, costs, lm-evaluation-harness; what a memory knows."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from layerzoo.data.corpus import digest, read_files
from layerzoo.data.task import IGNORE
from layerzoo.data.tokenizer import Tokenizer
from layerzoo.hf.convert import load, source_digest
from layerzoo.hf.modes import MODES, mode, vary
from layerzoo.metrics.wide import nats, right, wide
from layerzoo.spec import SpecError
from layerzoo.support.arguments import CommandParser, integers, make_folder
from layerzoo.support.json_files import write_json
from layerzoo.tools.bench.command import device, prepared
from layerzoo.tools.bench.stream import growth, in_a_process, table
from layerzoo.tools.evaluate import costs, positions

from .page import page
from .probe import explained


class Variant(NamedTuple):
    """One of the models that are compared: a folder, in a mode."""

    name: str
    model: Any
    mode: str


def pair(text: str) -> tuple[str, Path]:
    name, sign, folder = text.partition("=")
    if not sign or not name:
        raise argparse.ArgumentTypeError(f"expected NAME=DIR, got '{text}'")
    return name, Path(folder)


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser("layerzoo evaluate", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("folder", metavar="DIR", type=Path, help="evaluate the converted model of this folder")
    add(
        "--control",
        metavar="NAME=DIR",
        type=pair,
        action="append",
        default=[],
        help="compare it with this model",
    )
    add("--window", metavar="W", type=int, help="set the window of all models")
    add(
        "--text",
        metavar="FILES",
        action="append",
        help="read these files, or stdlib; may be repeated",
    )
    add(
        "--held_out",
        metavar="X",
        type=float,
        default=0.05,
        help="read the share X that training left out (default %(default)s)",
    )
    add(
        "--files",
        metavar="N",
        type=int,
        default=8,
        help="read N held-out files of each text (default %(default)s)",
    )
    add(
        "--length",
        metavar="T",
        type=int,
        default=2048,
        help="read T tokens of each file (default %(default)s)",
    )
    add("--probe", action="store_true", help="measure what memories know, and no losses")
    add("--kinds", metavar="KIND,..", default="", help="ask these: passkey, needle, key_value")
    add(
        "--lengths",
        metavar="T,..",
        type=integers,
        default=[512, 1024],
        help="ask in texts of these lengths",
    )
    add(
        "--depths",
        metavar="N",
        type=int,
        default=5,
        help="put the needle at N depths (default %(default)s)",
    )
    add(
        "--samples",
        metavar="N",
        type=int,
        default=8,
        help="ask N times at each depth and length (default %(default)s)",
    )
    add(
        "--costs", metavar="T,..", type=integers, default=[], help="measure costs at these lengths"
    )
    add("--stream", metavar="N", type=int, default=0, help="generate N tokens on end")
    add("--tasks", metavar="NAME,..", default="", help="run these tasks of lm-evaluation-harness")
    add("--include", metavar="DIR", type=Path, help="find more such tasks in this folder")
    add("--limit", metavar="N", type=int, help="run N samples of each task")
    add(
        "--device",
        type=device,
        default=torch.device("cpu"),
        help="run all but costs and stream here",
    )
    add(
        "--batch_size",
        metavar="N",
        type=int,
        default=1,
        help="read N texts at a time (default %(default)s)",
    )
    add("--threads", metavar="N", type=int, default=torch.get_num_threads(), help="use N threads")
    add(
        "--out",
        metavar="DIR",
        type=Path,
        required=True,
        help="write evaluation.json, .md and .png here",
    )
    options = parser.parse_args(argv)
    if options.batch_size < 1:
        raise SpecError(f"--batch_size: must be at least 1, got {options.batch_size}")
    for path in (options.folder, *(path for _, path in options.control)):
        if not (path / "config.json").is_file():
            raise SpecError(f"{path}: no config.json in it; give the folder of a converted model")
    return options


def variants_of(options: argparse.Namespace) -> list[Variant]:
    model = load(options.folder).to(options.device)
    controls = [(name, load(path).to(options.device)) for name, path in options.control]
    arms = [Variant(name, model, name) for name in MODES]
    return arms + [Variant(name, control, "memory") for name, control in controls]


def digests(options: argparse.Namespace) -> dict[str, str]:
    """Of the models that are compared and the text, whatever they are called."""
    models = {name: source_digest(path) for name, path in options.control}
    text = {"text": digest(read_files(options.text))} if options.text else {}
    return {"memory": source_digest(options.folder), **models, **text}


@contextmanager
def running(arm: Variant, window: int | None) -> Iterator[Any]:
    with vary(arm.model, window=window), mode(arm.model, arm.mode):
        yield arm.model


def texts_of(options: argparse.Namespace) -> dict[str, list[Any]]:
    how = (options.held_out, options.length, options.files, Tokenizer(str(options.folder)))
    return positions.held_out(options.text, *how)


def by_position(arms: Sequence[Variant], options: argparse.Namespace) -> dict[str, Any]:
    """Of each text the mean loss of each arm at each position, and its figures by range."""
    texts = texts_of(options)
    window = options.window or arms[0].model.config.window
    found: dict[str, Any] = {}
    for text, rows in texts.items():
        by_arm: dict[str, positions.Losses] = {}
        for arm in arms:
            with running(arm, options.window) as model:
                batches = torch.from_numpy(np.stack(rows)).split(options.batch_size)
                parts = [positions.losses(model, batch.to(options.device)) for batch in batches]
            by_arm[arm.name] = np.concatenate(parts)
            print(f"{text}: {arm.name}: {by_arm[arm.name].mean():.4f} nats", flush=True)
        found[text] = {"files": len(rows), **compared(by_arm, window, options.length)}
    return found


@np.errstate(invalid="ignore", divide="ignore")  # a model may be lost: nan and inf are shown
def compared(by_arm: dict[str, positions.Losses], window: int, length: int) -> dict[str, Any]:
    """Compare mean losses by range of positions: how much of the gap from window to full attention
    each arm recovers, and how much more the memory recovers than each control. Inside the window
    it is the drift from the source."""
    parts: dict[str, Any] = {}
    for name, where in positions.ranges(window, length).items():
        means = {arm: loss[:, where].mean(1) for arm, loss in by_arm.items()}
        full, alone = means["full"], means["window"]
        others = {arm: loss for arm, loss in means.items() if arm not in ("full", "window")}
        part: dict[str, Any] = {"nats": {arm: float(loss.mean()) for arm, loss in means.items()}}
        if name == "inside":
            part["drift"] = {a: positions.difference(x, full)._asdict() for a, x in others.items()}
        else:
            part["gap"] = positions.difference(alone, full)._asdict()
            part["recovered"] = {
                arm: positions.recovered(full, alone, loss)._asdict()
                for arm, loss in others.items()
            }
            part["beyond"] = {  # what the memory recovers less what a control does
                arm: positions.recovered(full, alone, alone - loss + others["memory"])._asdict()
                for arm, loss in others.items()
                if arm != "memory"
            }
        parts[name] = part
    curve = {arm: loss.mean(0).round(4).tolist() for arm, loss in by_arm.items()}
    return {"ranges": parts, "by_position": curve}


def probe(arms: Sequence[Variant], options: argparse.Namespace) -> dict[str, list[float]]:
    """Of each arm with a memory what it explains of what the window misses, block by block."""
    rows = torch.from_numpy(np.concatenate([*map(np.stack, texts_of(options).values())]))[:, :-1]
    window = options.window or arms[0].model.config.window
    if len(rows) < 2 or options.length <= window:
        raise SpecError(
            f"--probe: fits on one file and measures on another, past the window of {window}; "
            f"give two files of text, and a larger --length"
        )
    found = {}
    for arm in arms:
        if arm.mode == "memory":
            with running(arm, options.window) as model:
                found[arm.name] = explained(model, rows.to(options.device))
            share = np.mean(found[arm.name])
            print(f"probe: {arm.name}: {100 * share:.1f}% of what the window misses", flush=True)
    return found


def retrieval(arms: Sequence[Variant], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each kind, length, depth and arm: loss, accuracy of tokens and of answers."""
    from layerzoo.data.retrieval import grid

    tokenizer: Tokenizer = Tokenizer(str(options.folder))
    texts = positions.held_out(options.text, options.held_out, max(options.lengths), 64, tokenizer)
    corpus = np.concatenate([row for rows in texts.values() for row in rows])
    depths = np.linspace(0, 1, options.depths).tolist()
    found = []
    for kind in options.kinds.split(","):
        for length in options.lengths:
            questions = grid(corpus, tokenizer, kind, length, depths, options.samples)
            batches = [[x.to(options.device) for x in pair] for pair in questions]
            for arm in arms:
                with running(arm, options.window) as model:
                    for depth, (tokens, labels) in zip(depths, batches, strict=True):
                        row = {"kind": kind, "length": length, "depth": depth, "arm": arm.name}
                        found.append({**row, **answered(model, tokens, labels)})
                mine = [row for row in found if row["arm"] == arm.name and row["kind"] == kind]
                last = mine[-len(depths) :]
                whole, lost = (np.mean([row[x] for row in last]) for x in ("answers", "nats"))
                figures = f"{whole:.2f} right, {lost:.3f} nats"
                print(f"{kind} at {length}: {arm.name}: {figures}", flush=True)
    return found


def mean(values: torch.Tensor) -> float:
    return float(wide(values, values.device).mean())


@torch.no_grad()
def answered(model: Any, tokens: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    h, _ = model.hidden(tokens)
    where = labels != IGNORE
    logits, want = model.head(h[where]), labels[where]
    found = torch.zeros_like(where)
    found[where] = right(logits, want)
    return {
        "nats": mean(nats(logits, want)),
        "tokens": mean(found[where]),
        "answers": mean((found == where).all(1)),
    }


def all_costs(options: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for length in options.costs:
        for name in ("full", "window", "memory"):
            one = costs.cost(str(options.folder), name, length, options.threads)
            print(f"costs at {length}: {name}: {one.ms_per_token:.0f} ms a token", flush=True)
            found.append(one._asdict())
    return found


def streamed(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Memory and time of one long generation, in a process of its own."""
    found = in_a_process(costs.generated, str(options.folder), options.stream, options.threads)
    print(f"generated:\n{table('memory', found)}\n{growth(found)}", flush=True)
    return [point._asdict() for point in found]


def benchmarks(arms: Sequence[Variant], options: argparse.Namespace) -> dict[str, Any]:
    from .harness import harness

    found = {}
    for arm in arms:
        with running(arm, options.window) as model:
            tasks = options.tasks.split(",")
            found[arm.name] = harness(model, options.folder, tasks, options.include, options.limit)
    return found


def main(argv: Sequence[str]) -> int:
    options = arguments(argv)
    by_text = options.text and not options.probe  # which is quick, and comes before training
    parts: dict[str, tuple[Any, Callable[[], Any]]] = {
        "probe": (options.probe, lambda: probe(arms, options)),
        "positions": (by_text, lambda: by_position(arms, options)),
        "retrieval": (options.kinds, lambda: retrieval(arms, options)),
        "costs": (options.costs, lambda: all_costs(options)),
        "stream": (options.stream, lambda: streamed(options)),
        "harness": (options.tasks, lambda: benchmarks(arms, options)),
    }
    if not any(asked for asked, _ in parts.values()):
        raise SpecError("evaluate: asks for nothing; give --text, --costs, --stream or --tasks")
    for name, what in (("kinds", "its needles are hidden"), ("probe", "it looks")):
        if getattr(options, name) and not options.text:
            raise SpecError(f"evaluate: --{name} needs --text, in which {what}")
    make_folder("--out", options.out)
    arms = variants_of(options)
    window = options.window or arms[0].model.config.window
    found: dict[str, Any] = {"folder": str(options.folder), "window": window}
    found["digest"] = digests(options)
    with prepared(options.threads):
        for name, (asked, run) in parts.items():
            if asked:
                found[name] = run()
                # As it goes: what has been measured is not lost if the rest fails.
                write_json(options.out / "evaluation.json", found, indent=1)
    print(page(found, options.out))
    return 0
