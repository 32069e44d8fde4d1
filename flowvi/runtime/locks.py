"""Locks of open files that end with the process: of POSIX, or of Windows."""

from __future__ import annotations

import os
from typing import Any

try:
    import fcntl
except ImportError:
    ON_POSIX = False
else:
    ON_POSIX = True

# A byte far behind the words of the file: on Windows nobody else can read what is locked.
PLACE = 1 << 30
# Flags that Windows does not have.
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
NO_BLOCK = getattr(os, "O_NONBLOCK", 0)


def lock(handle: int, *, shared: bool = False) -> None:
    """Lock an open file at once.

    Args:
        handle: Of the file.
        shared: Whether others may lock it so too; on Windows no lock is shared.

    Raises:
        BlockingIOError: Another process has locked it.
        OSError: The file system has no locks.
    """
    if ON_POSIX:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        return
    import msvcrt

    windows: Any = msvcrt
    os.lseek(handle, PLACE, os.SEEK_SET)
    try:
        windows.locking(handle, windows.LK_NBLCK, 1)
    except PermissionError as error:
        raise BlockingIOError(*error.args) from None


def read_words(handle: int, most: int = 1000) -> str:
    """The text at the beginning of an open file."""
    os.lseek(handle, 0, os.SEEK_SET)
    return os.read(handle, most).decode(errors="replace").strip()


def write_words(handle: int, words: str) -> None:
    """Replace the content of an open file by a text."""
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, words.encode())
