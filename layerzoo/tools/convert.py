"""`layerzoo convert`: a pretrained model, with a memory beside its attention, in a folder."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from layerzoo.data import Text
from layerzoo.data.tokenizer import reason
from layerzoo.hf.centre import biased, centre
from layerzoo.hf.convert import convert, load_source
from layerzoo.spec import SpecError, error_at
from layerzoo.support.arguments import CommandParser, check_folder, integers, spec_of

CENTRE_ROWS, CENTRE_TOKENS = 8, 1024
"""Text that key biases are set by."""


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(
        "layerzoo convert",
        description="Put a memory beside the attention of a pretrained Llama, Qwen2 or Qwen3, "
        "and write the model, and its tokenizer, to a folder.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--source",
        metavar="PATH",
        required=True,
        help="convert the model of this folder or Hugging Face id",
    )
    add("--gguf", metavar="FILE", help="read this GGUF file of the folder")
    add(
        "--memory",
        metavar="SPEC",
        default="allmem",
        help="add this memory: a name, or a spec {name: ..}",
    )
    add(
        "--window",
        metavar="W",
        type=int,
        default=512,
        help="let a query see W tokens (default %(default)s)",
    )
    add(
        "--sinks",
        metavar="N",
        type=int,
        default=4,
        help="keep the first N tokens visible (default %(default)s)",
    )
    add("--layers", metavar="N,..", type=integers, help="convert these blocks only")
    add(
        "--write",
        default="all",
        choices=("all", "evicted"),
        help="give the memory every token, or those that leave the window",
    )
    add(
        "--scale_init",
        metavar="X",
        type=float,
        default=0.0,
        help="start the memory's scales at X (default %(default)s)",
    )
    add(
        "--centre",
        metavar="FILES",
        action="append",
        help="start key biases so that they take away the mean key of these files, or stdlib",
    )
    add(
        "--held_out",
        metavar="X",
        type=float,
        default=0.05,
        help="leave out the share X of the files of --centre (default %(default)s)",
    )
    add(
        "--seed",
        metavar="N",
        type=int,
        default=0,
        help="draw the memory's weights by this seed (default %(default)s)",
    )
    add(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="hold the weights in this type",
    )
    add("--out", metavar="DIR", type=Path, required=True, help="make this folder")
    return parser.parse_args(argv)


def save_tokenizer(source: str, gguf: str | None, out: Path) -> None:
    """The source's tokenizer beside the model, if it has one."""
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(source, gguf_file=gguf).save_pretrained(out)
    except (OSError, ValueError) as error:
        print(f"no tokenizer: {reason(error)}")


def some_text(options: argparse.Namespace) -> torch.Tensor:
    """Tokens `[CENTRE_ROWS, CENTRE_TOKENS]` of training files, by the source's tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(options.source, options.gguf, Path(folder))
        text = Text(
            files=options.centre,
            held_out=options.held_out,
            length=CENTRE_TOKENS,
            tokenizer=folder,
        )
        return torch.from_numpy(text.sample("train", np.arange(CENTRE_ROWS))["tokens"])


def main(argv: Sequence[str]) -> int:
    options = arguments(argv)
    if options.out.is_file() or (options.out.is_dir() and any(options.out.iterdir())):
        raise SpecError(f"--out {options.out}: is there already; give a new folder")
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    spec = spec_of(options.memory)
    check_folder("--out", options.out)
    torch.manual_seed(options.seed)
    model = convert(
        load_source(options.source, options.gguf, dtype),
        spec,
        window=options.window,
        sinks=options.sinks,
        layers=options.layers,
        write=options.write,
        scale_init=options.scale_init,
    )
    if options.centre:
        with error_at("--centre"):
            biased(model)  # before the text is read, which takes longer
            centre(model, some_text(options))
    model.save_pretrained(options.out)
    save_tokenizer(options.source, options.gguf, options.out)
    added, theirs = model.added_parameters()
    print(
        f"{options.out}: {len(model.mixers())} of {model.config.num_hidden_layers} blocks "
        f"converted; {added:,} parameters added to {theirs:,} ({100 * added / theirs:.1f}%)"
    )
    return 0
