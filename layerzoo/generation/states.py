"""States as data: rows of a batch, a check against a model, and files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from layerzoo.layer import State
from layerzoo.spec import SpecError, error_at

if TYPE_CHECKING:
    from layerzoo.model import LanguageModel

STRUCTURE = "layerzoo.state"
"""The metadata that holds a file's structure: JSON, a tensor by its name in the file."""


def select_rows(state: State, rows: list[int]) -> State:
    """Copies of some rows of a state, in that order. Every tensor is batch first, but for the
    positions, which are 0-d: rows run in step."""

    def pick(x: Tensor) -> Tensor:
        return x if x.dim() == 0 else x[torch.tensor(rows, device=x.device)]

    return tree_map(pick, state)


def batch_size(state: State) -> int:
    """Rows of a state.

    Raises:
        SpecError: it has none, or its tensors do not agree.
    """
    sizes = {len(x) for x in tree_leaves(state) if isinstance(x, Tensor) and x.dim()}
    if len(sizes) != 1:
        raise SpecError(f"state: its tensors do not have one batch size, but {sorted(sizes)}")
    return sizes.pop()


def check_state(model: LanguageModel, state: State) -> None:
    """Refuse a state that is not this model's.

    Structure and shapes must be those of its blocks' `init_state`, but for the batch size and for
    dimensions that start with 0 entries, the tokens of a cache. (Two windows are not told apart,
    nor two mini-batches.)

    Raises:
        SpecError: the first difference, and where it is.
    """
    rows = batch_size(state)
    want = [block.init_state(rows) for block in model.each_block()]
    with error_at("state: is not of this model"):
        _compare(state, want, "")


def _compare(got: Any, want: Any, place: str) -> None:
    where = f"{place}: " if place else ""
    if type(got) is not type(want):
        raise SpecError(f"{where}a {type(got).__name__} instead of a {type(want).__name__}")
    if isinstance(want, Tensor):
        shape = [n or m for n, m in zip(want.shape, got.shape, strict=False)]
        if got.dim() != want.dim() or list(got.shape) != shape:
            expected = [n or "any" for n in want.shape]
            raise SpecError(f"{where}shape {list(got.shape)} instead of {expected}")
        if got.is_floating_point() != want.is_floating_point():
            raise SpecError(f"{where}{got.dtype} instead of {want.dtype}")
    elif isinstance(want, dict):
        if got.keys() != want.keys():
            raise SpecError(f"{where}has {sorted(got)} instead of {sorted(want)}")
        for name in want:
            _compare(got[name], want[name], f"{place}.{name}".lstrip("."))
    elif isinstance(want, (list, tuple)):
        if len(got) != len(want):
            raise SpecError(f"{where}{len(got)} parts instead of {len(want)}")
        for n in range(len(want)):
            _compare(got[n], want[n], f"{place}.{n}".lstrip("."))


def save_state(path: str | Path, state: State) -> None:
    """Write a state to a safetensors file, whole or not at all.

    Args:
        state: any dicts, lists and tuples of tensors. Views are cut to what they show.

    Raises:
        SpecError: something else in the state, or a file that cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    structure = _flatten(state, "", tensors)
    part = Path(f"{path}.part")  # a state that is continued may be its own destination
    try:
        save_file(tensors, part, {STRUCTURE: json.dumps(structure)})
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SpecError(f"state {path}: cannot be written: {reason}") from None


def _flatten(x: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """The structure of x in JSON; its tensors are put into `tensors`."""
    if isinstance(x, Tensor):
        # Always a copy: tensors may share memory, which the format does not allow.
        tensors[name := place.strip("/")] = x.detach().to(
            "cpu", copy=True, memory_format=torch.contiguous_format
        )
        return name
    if type(x) is dict and all(isinstance(name, str) and "/" not in name for name in x):
        return {name: _flatten(part, f"{place}/{name}", tensors) for name, part in x.items()}
    if type(x) in (list, tuple):
        parts = [_flatten(part, f"{place}/{n}", tensors) for n, part in enumerate(x)]
        return [type(x).__name__, *parts]
    raise SpecError(
        f"state{place}: expected tensors in dicts, lists and tuples, got a {type(x).__name__}"
    )


def load_state(path: str | Path, model: LanguageModel | None = None) -> State:
    """The state of a file that `save_state` wrote.

    Args:
        model: check that the state is its own, and move it to its device (positions, 0-d, stay
            on the CPU).

    Raises:
        SpecError: the file is missing, damaged or something else, or the state another model's.
    """
    try:
        with safe_open(path, framework="pt") as file:
            structure = json.loads((file.metadata() or {})[STRUCTURE])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        state = _unflatten(structure, tensors)
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise SpecError(f"state {path}: cannot be read: {reason}") from None
    except (SafetensorError, KeyError, ValueError) as error:
        raise SpecError(
            f"state {path}: is damaged, or not one that layerzoo saved ({type(error).__name__})"
        ) from None
    if model is None:
        return state
    with error_at(f"{path}"):
        check_state(model, state)
    return to_device(state, model.embedding.weight.device)


def to_device(state: State, device: torch.device) -> State:
    """The state on a device, but for its positions, which are read on the CPU."""
    return tree_map(lambda x: x.to(device) if x.dim() else x, state)


def _unflatten(structure: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(structure, str):
        return tensors[structure]
    if isinstance(structure, dict):
        return {name: _unflatten(part, tensors) for name, part in structure.items()}
    kind, *parts = structure
    return {"list": list, "tuple": tuple}[kind](_unflatten(part, tensors) for part in parts)
