"""Forms: what an argument may be, as the annotations of jaxtyping state it.

Equal letters are equal sizes, `_` is any size, `2*H` and `K+P` are sums, and G, heads of keys that
query heads share, divides H. A form is a `Form` of tensors, a dict, tuple or list of forms, or
`Many` of one; None is anything.
"""

from __future__ import annotations

import ast
from typing import Any, NamedTuple

from torch import Tensor

Axis = str | int | tuple[tuple[int, str], ...] | None
"""A letter, a number, a sum of multiples of letters, or any size."""


class Form(NamedTuple):
    """A tensor of one of some shapes, by number of axes; or a number, in place of a 0-d one."""

    shapes: dict[int, tuple[Axis, ...]]
    texts: tuple[str, ...]
    integer: bool = False
    number: bool = False


class Many(NamedTuple):
    """A tuple of any length."""

    each: Any


def read_annotation(annotation: str) -> tuple[Any, bool]:
    """The form that an annotation states, or None, and whether the argument may be None."""
    nodes, parts = [ast.parse(annotation, mode="eval").body], []
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.BinOp):  # A | B
            nodes += [node.right, node.left]
        else:
            parts.append(node)
    names = [ast.unparse(node) for node in parts]
    forms = [_read_part(node) for node in parts if isinstance(node, ast.Subscript)]
    tensors = [form for form in forms if type(form) is Form]
    if len(tensors) > 1 or (tensors and "float" in names):
        shapes = {n: axes for form in tensors for n, axes in form.shapes.items()}
        texts = tuple(text for form in tensors for text in form.texts)
        return Form(shapes, texts, number="float" in names), "None" in names
    return (forms[0] if forms else None), "None" in names


def _read_part(node: ast.Subscript) -> Any:
    """Float[Tensor, "B T"], tuple[A, B] or tuple[A, ...]; None for anything else."""
    kind, parts = ast.unparse(node.value), getattr(node.slice, "elts", [node.slice])
    if kind in ("Float", "Int"):
        return tensor(parts[1].value, integer=kind == "Int")
    if kind != "tuple":
        return None
    forms = [read_annotation(ast.unparse(part))[0] for part in parts]
    return Many(forms[0]) if ast.unparse(parts[-1]) == "..." else tuple(forms)


def tensor(text: str, integer: bool = False) -> Form:
    """The form of tensors with these axes, as in "B T 2*H K"."""
    axes = tuple(map(_axis, text.split()))
    return Form({len(axes): axes}, (f"[{', '.join(text.split())}]",), integer)


def _axis(text: str) -> Axis:
    if text.isidentifier():
        return None if text == "_" else text
    if text.isdigit():
        return int(text)
    terms = (term.rpartition("*") for term in text.split("+"))
    return tuple((int(count or 1), letter) for count, _, letter in terms)


def form_of(state: Any) -> Any:
    """The form of states like one of no rows; of 0 entries there may be any number."""
    if isinstance(state, Tensor):
        sizes = " ".join(str(n or "_") for n in state.shape[1:])
        text = f"B {sizes}" if state.dim() else ""
        return tensor(text, integer=not state.is_floating_point())
    if isinstance(state, dict):
        return {name: form_of(part) for name, part in state.items()}
    if isinstance(state, (tuple, list)):
        return (list if isinstance(state, list) else tuple)(map(form_of, state))
    return None


def open_sums(form: Any) -> bool:
    """Whether a tensor has an axis that is a sum of several letters."""
    shapes = form.shapes.values() if type(form) is Form else ()
    return any(type(axis) is tuple and len(axis) > 1 for axes in shapes for axis in axes)
