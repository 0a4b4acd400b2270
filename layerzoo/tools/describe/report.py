"""A description as tables and as JSON."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from .costs import CostAtLength, PartCost

RULES = """\
FLOPs: matrix products, 2 a multiply-add, forward, per token. mean: over the T tokens of a sequence
(prefill); last: token T alone (decoding at the end). State: after T tokens, batch 1, caches of
attention and convolutions in {dtype}, memories in float32; buffers are what a memory needs beside
itself (pending writes, momentum) and convolutions. full: softmax attention in every block, with
heads, kv_heads and widths of the block's first attention, or else of its first memory."""


def text(found: dict[str, Any]) -> str:
    """The two tables and the rules of counting."""
    rows: list[tuple[str, ...]] = [
        ("block", "layer", "parameters", "FLOPs/token", "rule alone", "memory", "buffers")
    ]
    numbered = enumerate((block["layer"], block["figures"]) for block in found["blocks"])
    for (layer, part), run in itertools.groupby(numbered, key=lambda item: item[1]):
        blocks = [n for n, _ in run]
        same = f"{blocks[0]}-{blocks[-1]}, each" if len(blocks) > 1 else str(blocks[0])
        rows.append((same, layer, *part_cells(part)))
    layers = sum((block["figures"] for block in found["blocks"]), PartCost())
    sums = {"all layers": layers, **found["others"], "total": found["total"]}
    rows += [("", name, *part_cells(part)) for name, part in sums.items()]
    head = ("T", "state", "full", "ratio", "mean", "full", "ratio", "rules")
    head += ("last", "full", "ratio", "rules")
    lines = [head, *(cost_cells(ours, full) for ours, full in found["lengths"])]
    return "\n\n".join(
        (
            f"At T = {found['length']:,}:",
            table(rows, left=2),
            "State, and FLOPs per token of all layers. ratio: full attention's over this;\n"
            "rules: the same of the rules alone, without projections.",
            table(lines, left=0),
            RULES.format(dtype=found["dtype"]),
        )
    )


def part_cells(part: PartCost) -> tuple[str, ...]:
    flops = (si(x) if x else "" for x in (part.flops, part.rule))
    return (f"{part.parameters:,}", *flops, *(binary(x) for x in (part.memory, part.buffers)))


def cost_cells(ours: CostAtLength, full: CostAtLength) -> tuple[str, ...]:
    def ratio(name: str) -> str:
        less = getattr(ours, name)
        return f"{getattr(full, name) / less:.2f}" if less else "-"

    cells = [f"{ours.T:,}", binary(ours.state), binary(full.state), ratio("state")]
    for name in ("mean", "last"):
        values = (si(getattr(cost, name)) for cost in (ours, full))
        cells += [*values, ratio(name), ratio(f"{name}_rule")]
    return tuple(cells)


def si(x: float) -> str:
    """Four digits and a unit: 12.58M"""
    for unit in ("", "k", "M", "G", "T"):
        if x < 999.95 or unit == "T":
            return f"{x:.4g}{unit}"
        x /= 1000
    raise AssertionError


def binary(x: float) -> str:
    """1.5 MiB"""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if x < 1023.95 or unit == "TiB":
            return f"{x:.4g} {unit}" if x else ""
        x /= 1024
    raise AssertionError


def table(rows: Sequence[Sequence[str]], left: int) -> str:
    """Columns of equal width, the first `left` of them aligned at the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if n < left else cell.rjust(w)
            for n, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def to_json(found: dict[str, Any]) -> dict[str, Any]:
    def part(figures: PartCost) -> dict[str, Any]:
        return figures._asdict()

    blocks = [{**block, "figures": part(block["figures"])} for block in found["blocks"]]
    named = {name: part(figures) for name, figures in found["others"].items()}
    lengths = [{"this": a._asdict(), "full": b._asdict()} for a, b in found["lengths"]]
    whole = {"blocks": blocks, "others": named, "total": part(found["total"]), "lengths": lengths}
    return {**found, **whole}
