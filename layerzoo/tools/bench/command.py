"""`layerzoo bench ops|layers [NAME ...]`; `layerzoo bench generate` is in stream.py."""

from __future__ import annotations

import argparse
import gc
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from layerzoo.registry import build, get_layer, list_layers
from layerzoo.spec import SpecError, required, suggest
from layerzoo.support.arguments import PICTURES, CommandParser, check_file, spec_of
from layerzoo.tools.bench import report

from .calls import MEASURES
from .measure import copy_peak, gemm_peak
from .peers import choose_peers, peers_of
from .run import OURS, BenchRow, BenchSettings, bench

MODES = ("ops", "layers")
DTYPES = ("float32", "float64", "bfloat16", "float16")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got '{text}'")
    return int(text)


def lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(map(positive, text.split(","))))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"expected positive integers such as 1024,2048, got '{text}'"
        ) from None


def one_of(what: str, *known: str) -> Any:
    def check(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"unknown {what} '{text}'; {suggest(text, known)}")
        return text

    return check


def measures(text: str) -> tuple[str, ...]:
    check = one_of("measure", *MEASURES)
    return tuple(dict.fromkeys(check(name.strip()) for name in text.split(",")))


def device(text: str) -> torch.device:
    kind, _, index = text.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise argparse.ArgumentTypeError(f"unknown device '{text}'; known: cpu, cuda, cuda:1 ..")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"'{text}' is not available here; use cpu")
    return torch.device(text)


SIZES = {
    "batch": "run N sequences at a time",
    "heads": "give layers N heads",
    "dim": "give layers a width of N",
    "repeats": "time each pair N times",
}


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(
        "layerzoo bench",
        description="Time ops (the rules alone) or whole layers, in pairs with peers. "
        "(`layerzoo bench generate --help`: memory and time of one long generation; "
        "`layerzoo bench gpu --help`: the kernels, all of them; `layerzoo bench compile --help`: "
        "what they take of a GPU that is not here.)",
        allow_abbrev=False,
    )
    parser.missing = f"expected {' or '.join(MODES)}, then names of layers or none for all"
    add = parser.add_argument
    add("mode", metavar="ops|layers", type=one_of("benchmark", *MODES), help="time ops or layers")
    add(
        "names",
        metavar="NAME",
        nargs="*",
        help="time these layers, or specs as '{name: linear, heads: 2}'",
    )
    add("--against", metavar="PEERS", help="time these peers, or none (default: all that fit)")
    add(
        "--lengths",
        metavar="T,..",
        type=lengths,
        default=BenchSettings.lengths,
        help="run sequences of T tokens",
    )
    add(
        "--measure",
        type=measures,
        default=tuple(MEASURES),
        help=f"measure some of {','.join(MEASURES)}",
    )
    for name, default in (("batch", 2), ("heads", 4), ("dim", 256), ("repeats", 10)):
        add(
            f"--{name}",
            metavar="N",
            type=positive,
            default=default,
            help=f"{SIZES[name]} (default {default})",
        )
    add(
        "--tokens",
        metavar="N",
        type=positive,
        help="let a batch have N tokens, in place of --batch",
    )
    add(
        "--dtype",
        type=one_of("dtype", *DTYPES),
        default="float32",
        help=f"run in {', '.join(DTYPES)}",
    )
    add("--device", type=device, default=torch.device("cpu"), help="run on cpu or cuda")
    add("--impl", default="auto", help="run ours by auto, recurrent, chunked or triton")
    add("--compiled", action="store_true", help="compile the inner loops of ours")
    add("--threads", metavar="N", type=positive, help="use N threads of the CPU")
    add("--json", metavar="FILE", type=Path, help="write all numbers")
    add("--plot", metavar="FILE", type=Path, help=f"draw time against T ({' '.join(PICTURES)})")
    return parser.parse_intermixed_args(argv)


def specs_of(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The specs to time, by their label; they build, and have a rule where one is needed."""
    found: dict[str, dict[str, Any]] = {}
    for text in options.names or list_layers():
        spec = spec_of(text)
        cls = get_layer(spec.get("name", ""))
        fields = {field.name: field for field in cls.Config.fields()}
        if not options.names and any(map(required, fields.values())):
            continue
        label = text if text == cls.name else label_of(spec)
        if "heads" in fields:
            spec = {"heads": options.heads, **spec}
        layer = build(spec, dim=options.dim)
        if options.mode == "ops" and layer.inner(torch.zeros(1, 1, layer.dim)) is None:
            if options.names:
                raise SpecError(f"{label}: has no rule to time alone; use `layerzoo bench layers`")
            continue
        found[label] = spec
    return found


def label_of(spec: dict[str, Any]) -> str:
    """linear(decay=scalar)"""
    fields = ", ".join(f"{k}={v}" for k, v in spec.items() if k != "name")
    return f"{spec['name']}({fields})" if fields else spec["name"]


@contextmanager
def prepared(threads: int | None) -> Iterator[None]:
    """With so many threads, and with all that is loaded out of the garbage collector's sight: it
    runs before each measure, and would take longer than most."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        torch.set_num_threads(before)


def main(argv: Sequence[str]) -> int:
    if argv and (other := {"generate": "stream", "gpu": "gpu", "compile": "compile"}.get(argv[0])):
        return importlib.import_module(f"layerzoo.tools.bench.{other}").main(argv[1:])
    options = arguments(argv)
    check_file("--json", options.json)
    check_file("--plot", options.plot, PICTURES)
    specs = specs_of(options)
    names = [spec["name"] for spec in specs.values()]
    settings = BenchSettings(
        mode=options.mode,
        lengths=options.lengths,
        batch=options.batch,
        tokens=options.tokens,
        heads=options.heads,
        dim=options.dim,
        dtype=getattr(torch, options.dtype),
        device=options.device,
        impl=options.impl,
        compiled=options.compiled,
        repeats=options.repeats,
        measures=options.measure,
        against=choose_peers(options.against, options.mode, names, options.device.type),
    )
    with prepared(options.threads):
        run_benchmarks(specs, settings, options)
    return 0


def run_benchmarks(
    specs: dict[str, dict[str, Any]], settings: BenchSettings, options: argparse.Namespace
) -> None:
    peers = {
        peer
        for spec in specs.values()
        for peer in peers_of(settings.mode, spec["name"], settings.device.type)
        if settings.wants(peer)
    }
    peaks = report.Peaks(gemm_peak(settings.dtype, settings.device), copy_peak(settings.device))
    table = report.Table(specs, (OURS, *(peer.name for peer in peers)), peaks)
    print(report.header(settings, peaks), table.head(), sep="\n\n")
    rows: list[BenchRow] = []
    skipped: dict[str, None] = {}  # a set in order
    for label, spec in specs.items():
        for T in settings.lengths:
            new = bench(spec, label, T, settings, skipped)
            print(*map(table.row, new), sep="\n", flush=True)
            rows += new
    for reason in skipped:
        print(f"skipped: {reason}")
    if options.json:
        report.write_json(
            options.json,
            rows,
            settings,
            peaks,
            versions=report.versions(peers),
            skipped=[*skipped],
        )
    if options.plot:
        plot = importlib.import_module("layerzoo.tools.bench.plot").plot
        plot(report.title(settings, tuple(specs)), rows, options.plot)
