"""Where in the user's own code something happens."""

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
STANDARD = f"{Path(contextlib.__file__).parent}/"


def user_line() -> str:
    """The innermost line of the call stack that belongs to the user's own code."""
    for frame in reversed(traceback.extract_stack()):
        standard = f"{Path(frame.filename).parent}/" == STANDARD
        if not standard and not frame.filename.startswith(LIBRARIES):
            return f'{Path(frame.filename).name}:{frame.lineno} "{frame.line}"'
    return "an unknown line"
