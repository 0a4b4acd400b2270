"""`layerzoo generate`: text or token ids as they come, from a checkpoint and a state."""

from __future__ import annotations

import argparse
import codecs
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from layerzoo.data.tokenizer import Tokenizer
from layerzoo.generation.decode import PIECE, stream
from layerzoo.generation.states import check_state, load_state, save_state
from layerzoo.model import LanguageModel
from layerzoo.spec import SpecError, error_at
from layerzoo.support.arguments import CommandParser, check_file
from layerzoo.train.find_checkpoint import find_checkpoint
from layerzoo.train.lit import load_model

BYTES = 256


def ids(text: str) -> list[int]:
    try:
        return list(map(int, text.split()))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers, got '{text}'") from None


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(
        "layerzoo generate",
        description="Continue a prompt, or a state, with a trained model.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "path",
        metavar="CHECKPOINT",
        nargs="?",
        help="continue with this .ckpt file, a run's folder, last, or a converted model",
    )
    add("--checkpoint", metavar="CHECKPOINT", help="name the checkpoint by an option")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--prompt", metavar="TEXT", help="continue this text (a model of bytes, or --tokenizer)"
    )
    what.add_argument(
        "--prompt_file", metavar="FILE", help="continue this file, without repeating it"
    )
    what.add_argument(
        "--tokens", metavar="IDS", type=ids, help="continue these tokens, separated by spaces"
    )
    add("--tokenizer", metavar="PATH", help="read text by this file, folder or Hub id")
    add(
        "--max_new_tokens",
        metavar="N",
        type=int,
        default=200,
        help="write N tokens at most (default %(default)s)",
    )
    add(
        "--temperature",
        metavar="X",
        type=float,
        default=0.8,
        help="divide logits by X; 0 is greedy (default %(default)s)",
    )
    add("--top_k", metavar="K", type=int, help="sample among the K likeliest tokens")
    add("--top_p", metavar="P", type=float, help="sample among the likeliest that sum to P")
    add("--stop", metavar="IDS", type=ids, default=[], help="end after any of these tokens")
    add(
        "--seed",
        metavar="N",
        type=int,
        default=0,
        help="sample by this seed (default %(default)s)",
    )
    add("--impl", default="auto", help="run layers by auto, recurrent, chunked or triton")
    add("--piece", metavar="N", type=int, default=PIECE, help="read a prompt N tokens at a time")
    add("--state", metavar="FILE", help="continue this state; a prompt is then read after it")
    add("--save_state", metavar="FILE", help="write the state at the end")
    options = parser.parse_args(argv)
    if (options.path is None) == (options.checkpoint is None):
        raise SpecError("generate: needs one checkpoint: layerzoo generate CHECKPOINT ..")
    options.checkpoint = options.checkpoint or options.path
    if options.state is None and all(
        x is None for x in (options.prompt, options.prompt_file, options.tokens)
    ):
        raise SpecError("generate: needs --prompt, --prompt_file, --tokens or --state")
    check_file("--save_state", options.save_state)
    return options


def model_of(options: argparse.Namespace) -> Any:
    """Of a checkpoint, or a converted model with the tokenizer in its folder."""
    if not Path(options.checkpoint, "config.json").is_file():
        return load_model(find_checkpoint(options.checkpoint), impl=options.impl)
    model = importlib.import_module("layerzoo.hf").load(options.checkpoint)
    for block in model.each_block():
        block.layer.impl = options.impl
    if options.tokenizer is None and Path(options.checkpoint, "tokenizer.json").is_file():
        options.tokenizer = options.checkpoint
    return model


def tokenizer_of(options: argparse.Namespace, model: LanguageModel) -> Tokenizer | None:
    if options.tokenizer is None:
        return None
    with error_at("--tokenizer"):
        tokenizer = Tokenizer(options.tokenizer)
    if tokenizer.vocab_size > model.config.vocab_size:  # a model's may be padded
        raise SpecError(
            f"--tokenizer {options.tokenizer}: has {tokenizer.vocab_size} tokens, "
            f"the model {model.config.vocab_size}; give the one that it was trained with"
        )
    return tokenizer


def prompt_of(
    options: argparse.Namespace, model: LanguageModel, tokenizer: Tokenizer | None
) -> list[int]:
    """The token ids to read; none where only a state is continued."""
    if options.tokens is not None:
        return options.tokens
    option = "--prompt" if options.prompt is not None else "--prompt_file"
    if options.prompt is None and options.prompt_file is None:
        return []
    if tokenizer is None and model.config.vocab_size != BYTES:
        raise SpecError(
            f"{option}: the model has {model.config.vocab_size} tokens, not bytes; "
            "use --tokens or --tokenizer"
        )
    if options.prompt is not None:
        # What the shell passed, also where it is no UTF-8.
        text = options.prompt.encode(errors="surrogateescape")
    else:
        try:
            text = Path(options.prompt_file).read_bytes()
        except OSError as error:
            raise SpecError(f"--prompt_file {options.prompt_file}: {error.strerror}") from None
    return list(text) if tokenizer is None else tokenizer.encode([text])[0].tolist()


def read_saved(path: str, model: LanguageModel) -> tuple[list[int], Any]:
    """The token that a saved state has not read yet, and the state."""
    saved = load_state(path)
    if not isinstance(saved, dict) or saved.keys() != {"unread", "state"}:
        raise SpecError(f"--state {path}: was not written by `layerzoo generate --save_state`")
    with error_at(f"--state {path}"):
        check_state(model, saved["state"])
    return saved["unread"].tolist(), saved["state"]


class Printer:
    """Prints tokens as they come: as text, whose characters may span several, or as ids."""

    def __init__(self, text: bool, tokenizer: Tokenizer | None = None) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace") if text else None
        self.decode = None if tokenizer is None else tokenizer.decoder()
        self.between = ""

    def put(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            if self.decode is not None:
                sys.stdout.write(self.decode([token]))
            elif self.decoder is not None:
                sys.stdout.write(self.decoder.decode(bytes([token])))
            else:
                sys.stdout.write(f"{self.between}{token}")
                self.between = " "
        sys.stdout.flush()

    def end(self) -> None:
        print(self.decoder.decode(b"", final=True) if self.decoder is not None else "")


def main(argv: Sequence[str]) -> int:
    options = arguments(argv)
    model = model_of(options)
    tokenizer = tokenizer_of(options, model)
    prompt, unread, state = prompt_of(options, model, tokenizer), [], None
    if options.state is not None:
        unread, state = read_saved(options.state, model)
    tokens = stream(
        model,
        unread + prompt,
        options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        stop=options.stop,
        seed=options.seed,
        state=state,
        piece=options.piece,
    )
    text = model.config.vocab_size == BYTES and options.tokens is None and tokenizer is None
    printer = Printer(text, tokenizer)
    printer.put(prompt if options.prompt_file is None else [])  # a book is not repeated
    for token in tokens:
        printer.put([token])
    printer.end()
    if options.save_state is not None:
        # The newest token is printed but not read: the state goes on with it.
        unread = torch.tensor([tokens.unread])
        save_state(options.save_state, {"unread": unread, "state": tokens.state})
    return 0
