"""Lines of the user's own code, for messages."""

from __future__ import annotations

import contextlib
import traceback
from pathlib import Path

import opt_einsum
import pyro
import torch

# Frames in these folders are not the user's.
LIBRARIES = tuple(
    f"{Path(file).parent}/"
    for file in (torch.__file__, pyro.__file__, opt_einsum.__file__, str(Path(__file__).parent))
)
# Frames in these folders only carry out tensor operations for other code.
NOT_CALLING = tuple(
    f"{Path(file).parent}/" for file in (torch.__file__, str(Path(__file__).parent))
)
STANDARD = f"{Path(contextlib.__file__).parent}/"


def in_assertion() -> bool:
    """Whether the code that called torch is an `assert`, which decides about no value."""
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(NOT_CALLING):
            return (frame.line or "").startswith("assert ")
    return False


def user_line() -> str:
    """The innermost line of the call stack that belongs to the user's own code."""
    for frame in reversed(traceback.extract_stack()):
        if _is_own(frame):
            return f'{Path(frame.filename).name}:{frame.lineno} "{frame.line}"'
    return "an unknown line"


def lines_of(error: BaseException) -> str:
    """The lines outside of torch and Pyro that an error came through, from where it is caught."""
    frames = traceback.extract_tb(error.__traceback__)
    return "\n".join(frame.line or "" for frame in frames if _is_own(frame))


def _is_own(frame: traceback.FrameSummary) -> bool:
    standard = f"{Path(frame.filename).parent}/" == STANDARD
    return not standard and not frame.filename.startswith(LIBRARIES)
