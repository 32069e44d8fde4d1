"""Files that are complete or absent, and checksums that readers verify.

A writer returns a `Checksum`, the size and checksum of the file. A reader that is given it refuses
a file that differs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from flowvi.runtime.locks import NO_BLOCK, NO_FOLLOW, lock, read_words, write_words

# Largest header, and largest JSON file, that is read.
LONGEST_TEXT = 16 * 2**20
LOCK = "lock"
# Temporary files that a crash leaves behind.
PART = re.compile(r"\..+\.[0-9a-f]{8}\.part")


class CheckpointError(ValueError):
    """A file or a folder does not hold what flowvi wrote there."""


class Checksum(NamedTuple):
    """Size and checksum of a file.

    Attributes:
        size: Number of bytes.
        sha256: Checksum of the content.
    """

    size: int
    sha256: str


# Writing.


def make_folder(where: str | os.PathLike[str], what: str) -> Path:
    """A folder to write to, made if it does not exist.

    Raises:
        CheckpointError: It cannot be made, or is a file.
    """
    if not isinstance(where, str | os.PathLike) or not os.fspath(where):
        raise CheckpointError(f"{what} goes into a folder, given by its path; got {where!r}.")
    path = Path(where)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise CheckpointError(f"'{where}' cannot hold {what}: it is no folder.") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"'{where}' cannot hold {what}: {why}.") from None
    return path


@contextmanager
def atomic_replace(file: Path) -> Iterator[Path]:
    """A temporary file that replaces another file when the block ends without an error.

    The temporary file lies beside the other file and gets its mode. If the other file is a
    link, the file behind the link is replaced. After an error the old file is unchanged, and
    the temporary file is removed.

    Raises:
        OSError: The disk is full, or the file is a device or a folder; the error names the file.
    """
    final = file.resolve()
    part = final.with_name(f".{final.name}.{secrets.token_hex(4)}.part")
    try:
        old = final.stat() if final.exists() else None
        if old is not None and not stat.S_ISREG(old.st_mode):
            raise OSError(f"{file} is no regular file; nothing was written to it.")
        with _unlinked_after(part):
            handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                if old is not None:
                    os.fchmod(handle, stat.S_IMODE(old.st_mode))
                yield part
                # Some file systems report a full disk only at this point.
                os.fsync(handle)
            finally:
                os.close(handle)
            os.replace(part, final)
        _sync(final.parent)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error_reason(error), str(file)) from error


@contextmanager
def _unlinked_after(part: Path) -> Iterator[None]:
    """Remove a temporary file if the block fails."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def error_reason(error: OSError) -> str:
    """The reason of an operating system error, without its number and file names."""
    return error.strerror or str(error)


def write_atomic(file: Path, content: bytes | memoryview) -> Checksum:
    """Write a file completely, or leave it unchanged.

    Raises:
        OSError: As for `atomic_replace`.
    """
    with atomic_replace(file) as part:
        part.write_bytes(content)
    return Checksum(len(content), hashlib.sha256(content).hexdigest())


def write_json(file: Path, content: Any) -> Checksum:
    """Write lists, dictionaries with names as keys, numbers and text."""
    return write_atomic(file, json.dumps(content, indent=1).encode())


# Reading.


def read_checked(file: Path, checksum: Checksum | None = None) -> bytes:
    """Read a file and verify its size and checksum, if they are given.

    Raises:
        CheckpointError: The file is missing, empty, no regular file, or differs from the seal.
    """
    with _opened(file, checksum) as source:
        content = source.read()
    if checksum is not None and hashlib.sha256(content).hexdigest() != checksum.sha256:
        raise CheckpointError(f"{file} has another checksum than when it was written: damaged?")
    return content


def read_prefix(file: Path, size: int, checksum: Checksum | None = None) -> bytes:
    """Read the first bytes of a file, and verify its size."""
    with _opened(file, checksum) as source:
        return source.read(size)


def read_json(file: Path) -> Any:
    """Read a file of JSON."""
    if len(read_prefix(file, LONGEST_TEXT + 1)) > LONGEST_TEXT:
        raise CheckpointError(f"{file} is longer than any that flowvi writes.")
    return parse_json(read_checked(file), file)


def parse_json(text: bytes, file: Path) -> Any:
    """Read JSON that was found in a file."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not a file that flowvi wrote: {error}.") from None


# Folders.


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a folder against other runs for the duration of the block, and sweep it.

    The lock ends with the process, also after a crash.

    Raises:
        CheckpointError: Another run has locked the folder (the message names its process), or
            the folder cannot be written to.
    """
    try:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | NO_FOLLOW, 0o666)
    except OSError as error:
        raise CheckpointError(f"{folder / LOCK} cannot be locked: {error.strerror}.") from None
    try:
        try:
            lock(handle)
        except OSError:
            owner = read_words(handle) or "unknown"
            raise CheckpointError(
                f"{folder} is in use by another run ({owner}); wait for it or name another folder."
            ) from None
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        with suppress(OSError):  # on a full disk; the words are for people
            write_words(handle, f"process {os.getpid()} on {socket.gethostname()}, {since}")
        remove_partial_files(folder)
        yield
    finally:
        os.close(handle)


def lock_owner(folder: Path) -> str:
    """The process of the run that has locked a folder; empty if none has."""
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY | NO_FOLLOW | NO_BLOCK)
    except OSError:
        return ""
    try:
        lock(handle, shared=True)
        return ""
    except BlockingIOError:
        return read_words(handle) or "unknown"
    except OSError:
        return ""
    finally:
        os.close(handle)


@contextmanager
def hold_folder(folder: Path) -> Iterator[bool]:
    """Lock a folder for one command, without a lock file; yields whether the lock was free.

    The lock ends with the process. On file systems without such locks, and on Windows, it is
    always free.
    """
    if sys.platform == "win32":
        yield True
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            lock(handle)
        except BlockingIOError:
            yield False
            return
        except OSError:
            # Some network file systems cannot lock folders.
            pass
        yield True
    finally:
        os.close(handle)


def remove_partial_files(folder: Path) -> None:
    """Remove temporary files that crashes have left."""
    for file in folder.iterdir():
        if PART.fullmatch(file.name) and not file.is_symlink():
            if file.is_dir():
                shutil.rmtree(file, ignore_errors=True)
            elif file.is_file():
                file.unlink(missing_ok=True)


@contextmanager
def _opened(file: Path, checksum: Checksum | None) -> Iterator[BinaryIO]:
    try:
        # Opening a named pipe would block.
        handle = os.open(file, os.O_RDONLY | NO_BLOCK | NO_FOLLOW | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing.") from None
    except OSError as error:
        if file.is_symlink():
            raise CheckpointError(
                f"{file} is a link, and flowvi reads no file outside of the folder that it was "
                "given; put the file itself there."
            ) from None
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from None
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{file} is no regular file.")
        if found.st_size == 0:
            raise CheckpointError(f"{file} is empty (0 bytes): an incomplete write?")
        if checksum is not None and found.st_size != checksum.size:
            raise CheckpointError(
                f"{file} has {found.st_size} bytes where {checksum.size} were written: it was cut "
                "off or changed."
            )
        with os.fdopen(handle, "rb", closefd=False) as source:
            yield source
    finally:
        os.close(handle)


def _sync(folder: Path) -> None:
    """Have the names in a folder written to the disk; Windows does so by itself."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
