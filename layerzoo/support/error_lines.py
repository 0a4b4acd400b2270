"""What other libraries, and the system, raise of an error of use, in one line."""

from __future__ import annotations

import os
import re
import textwrap
from types import TracebackType

from layerzoo.ops import ImplError
from layerzoo.spec import SpecError

CHECKERS = ("lightning", "lightning_utilities", "jsonargparse", "torchmetrics", "omegaconf")
"""The packages that check what a config asks of them. A fault of our own is raised elsewhere."""
CHECKS = (ValueError, TypeError, RuntimeError, ImportError)
"""What their checks raise, beside exceptions of their own."""
OWN = {
    "lightning": ("MisconfigurationException",),
    "jsonargparse": ("ArgumentError",),
    "omegaconf": ("OmegaConfBaseException",),
    "yaml": ("YAMLError",),
}
"""Those exceptions, by package: they are errors of use wherever they are raised."""
MEMORY = "out of memory|can't allocate memory|not enough memory|[Cc]annot allocate memory"
MEMORY += "|size calculation overflowed|multiplication overflow|Overflow when unpacking long"
"""What says that a tensor is too large for the machine, or for a number of its bytes."""


def spec_error(error: BaseException | None) -> SpecError | None:
    """The SpecError that an exception was raised from, if any."""
    while error is not None and not isinstance(error, SpecError):
        error = error.__cause__ or error.__context__
    return error


def line(error: BaseException) -> str | None:
    """What an exception says of the user's input or machine, in one line; None if it is a fault
    of the program, whose traceback is wanted."""
    if isinstance(error, SpecError | ImplError):
        return str(error)
    if isinstance(error, OSError):
        return _of_system(error)
    if isinstance(error, MemoryError) or re.search(MEMORY, str(error)):
        return f"out of memory: {_short(error)}; take a smaller batch, length or model"
    if isinstance(error, ModuleNotFoundError) and not _is_ours(error):
        return f"needs the package {error.name}: pip install {error.name}"
    own = {name for cls in type(error).__mro__ for name in OWN.get(_package(cls.__module__), ())}
    if own & {cls.__name__ for cls in type(error).__mro__}:
        return _short(error)
    if isinstance(error, CHECKS) and _raised_in(error.__traceback__) in CHECKERS:
        return _short(error)
    return None


def _of_system(error: OSError) -> str:
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    return where + (error.strerror or _short(error))


def _is_ours(error: ModuleNotFoundError) -> bool:
    return error.name is None or _package(error.name) == "layerzoo"


def _raised_in(trace: TracebackType | None) -> str:
    """The package of the innermost frame."""
    module = ""
    while trace is not None:
        module, trace = trace.tb_frame.f_globals.get("__name__", ""), trace.tb_next
    return _package(module)


def _package(module: str) -> str:
    return module.partition(".")[0]


def _short(error: BaseException) -> str:
    text = plain_union(str(error)) if UNION in str(error) else str(error)
    return textwrap.shorten(text or type(error).__name__, 400, placeholder=" ..")


UNION = "Union subtypes"
"""What jsonargparse's messages hold that list what each of several types has to say."""


def plain_union(message: str) -> str:
    """What such a message comes down to: the class that was named cannot be made, or what was
    expected instead of the value."""
    if missing := re.search(r"Requirement '([\w-]+)[^']*' not met", message):
        return f"needs the package {missing[1]}: pip install {missing[1]}"
    entry = r"\s*(.+?)(?=\n\s*- |\n\s*Given value|$)"
    if named := re.search(rf"Problem with given class_path '([^']+)':{entry}", message, re.DOTALL):
        return f"{named[1]}: {' '.join(named[2].split())}"
    if ours := re.search(r"- (.*(?:did you mean|; known: ).*)", message):
        return ours[1]
    wanted = re.findall(r"- Expected an? (?:<class '(?:\w+\.)*(\w+)'>|typing\.(.+))", message)
    value = re.findall(r"Given value: (.*)", message)
    words = {"Sequence": "a list", "NoneType": "null"}
    names = [*dict.fromkeys(words.get(name, name) or literal for name, literal in wanted)]
    if names == ["null"]:  # what the types that matter say is not of this form
        return next(iter(re.findall(r"- (?!Expected a <class 'NoneType'>)(.+)", message)), message)
    return f"expected {' or '.join(names)}, got {' '.join(value)}"
