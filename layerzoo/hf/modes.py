"""What one set of weights can be: the source with full attention, a window alone, a memory beside
it; and another window, or mini-batch, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from layerzoo.spec import SpecError, suggest

MODES = {
    "full": "the source: full attention, no memory",
    "window": "window and sinks alone",
    "memory": "window, sinks and memory",
}


@contextmanager
def mode(model: Any, name: str) -> Iterator[None]:
    """Run a converted model as one of MODES. No state may cross the border.

    Raises:
        SpecError: no such mode.
    """
    if name not in MODES:
        raise SpecError(f"unknown mode '{name}'; {suggest(name, MODES)}")
    with ExitStack() as stack:
        stack.enter_context(changed([model], "alone", name != "memory"))
        if name == "full":
            stack.enter_context(changed(model.windows(), "window", None))
        yield


@contextmanager
def vary(
    model: Any,
    *,
    window: int | None = None,
    sinks: int | None = None,
    mini_batch: int | None = None,
    drop: float | None = None,
) -> Iterator[None]:
    """Another window, sinks, mini-batch of the memories, or share of rows that training leaves
    without a window; None leaves each as it is. Rates of a memory stay what its own mini-batch
    made them.

    Raises:
        SpecError: a mini-batch, but no memory that has one.
    """
    mixers = model.mixers()
    inside = [layer for mixer in mixers for layer in mixer.layers[1:].modules()]
    batched = [layer for layer in inside if hasattr(layer, "mini_batch")]
    if mini_batch is not None and not batched:
        raise SpecError("mini_batches: the memory of this model has no mini-batch; leave it out")
    late = [mixer for mixer in mixers if mixer.evicts]  # the window that tokens leave
    with ExitStack() as stack:
        for layers, name, value in (
            ([*model.windows(), *late], "window", window),
            ([*model.windows(), *late], "sinks", sinks),
            (batched, "mini_batch", mini_batch),
            (mixers, "drop", drop),
        ):
            if value is not None:
                stack.enter_context(changed(layers, name, value))
        yield


@contextmanager
def changed(objects: list[Any], name: str, value: Any) -> Iterator[None]:
    """An attribute of each, set for a while."""
    before = [getattr(one, name) for one in objects]
    try:
        for one in objects:
            setattr(one, name, value)
        yield
    finally:
        for one, old in zip(objects, before, strict=True):
            setattr(one, name, old)
