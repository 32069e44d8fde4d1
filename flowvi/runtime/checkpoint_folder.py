"""The checkpoint folder: a fit saves its states there, and an interrupted fit resumes from them."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flowvi._version import __version__
from flowvi.runtime import distributed
from flowvi.runtime.files import (
    CheckpointError,
    Checksum,
    error_reason,
    lock_folder,
    make_folder,
    read_json,
    write_json,
)
from flowvi.runtime.tensors import read_state, write_state

FORMAT = 1
MANIFEST, PREVIOUS = "manifest.json", "manifest.previous.json"
FIELDS = {"about": dict, "software": dict, "pieces": list, "states": list, "written": int}
NAME = re.compile(r"(piece|state)-\d{4,12}\.safetensors")


@dataclass(frozen=True)
class CheckpointFile:
    """A file of the folder.

    Attributes:
        name: Name of the file.
        what: Name of the piece of the fit that the state belongs to.
        place: Number of that piece, from 1.
        checksum: Size and checksum of the file.
    """

    name: str
    what: str
    place: int
    checksum: Checksum

    @staticmethod
    def from_manifest(entry: Any, manifest: Path) -> CheckpointFile:
        """Read an entry of a manifest; the manifest may be damaged."""
        try:
            seal = Checksum(int(entry["size"]), str(entry["sha256"]))
            found = CheckpointFile(
                str(entry["name"]), str(entry["what"]), int(entry["place"]), seal
            )
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{manifest} is not a file that flowvi wrote.") from None
        if not NAME.fullmatch(found.name):
            raise CheckpointError(f"{manifest}: '{found.name}' is no name of a checkpoint's file.")
        return found

    def to_manifest(self) -> dict[str, Any]:
        """The entry as the manifest has it."""
        return {
            "name": self.name,
            "what": self.what,
            "place": self.place,
            **self.checksum._asdict(),
        }


class CheckpointFolder:
    """A folder of files, each of which is complete even after a crash.

    The manifest, with the checksums of all files, is written last. At any time, the
    present manifest or the previous one describes files that exist.

    Attributes:
        folder: Path of the folder.
        pieces: Results of the finished pieces of the fit, in their order.
        states: The last two states of the piece after them, the newest first.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder, self.about = folder, json.loads(json.dumps(about))
        self.pieces: list[CheckpointFile] = []
        self.states: list[CheckpointFile] = []
        self._previous: list[CheckpointFile] = []
        self._written = 0

    def load_manifest(self) -> None:
        """Read the manifest of an earlier fit.

        Raises:
            CheckpointError: No manifest is complete, or it belongs to another fit.
        """
        manifest, file = self._read_manifest()
        check_same_fit(manifest["about"], self.about, self.folder)
        if manifest["software"] != environment():
            a, b = manifest["software"], environment()
            changes = [f"{k} {a.get(k)} is now {b[k]}" for k in b if a.get(k) != b[k]]
            warnings.warn(
                f"{self.folder} is resumed with other software or hardware ({', '.join(changes)}): "
                "the result is equally valid, but not identical to the bit.",
                stacklevel=2,
            )
        self.pieces = [CheckpointFile.from_manifest(entry, file) for entry in manifest["pieces"]]
        self.states = [CheckpointFile.from_manifest(entry, file) for entry in manifest["states"]]
        self._previous, self._written = [*self.pieces, *self.states], manifest["written"]

    def read(self, entry: CheckpointFile) -> Any:
        """Read a state; None, with a warning, if the file is damaged."""
        try:
            return read_state(self.folder / entry.name, entry.checksum)
        except CheckpointError as error:
            warnings.warn(f"{error} The fit continues from the checkpoint before it.", stacklevel=4)
            return None

    def save_result(self, what: str, place: int, state: Any) -> None:
        """Save the result of a finished piece; the states of that piece are removed."""
        entry = self._write("piece", what, place, state)
        if entry is not None:
            self._write_manifest([*self.pieces[: place - 1], entry], [])

    def save_state(self, what: str, place: int, state: Any) -> None:
        """Save a state of the present piece; the last two states are kept."""
        entry = self._write("state", what, place, state)
        if entry is not None:
            self._write_manifest(
                self.pieces, [entry, *(s for s in self.states[:1] if s.place == place)]
            )

    def discard_from(self, place: int) -> None:
        """Forget a piece and all pieces after it."""
        self.pieces, self.states = self.pieces[: place - 1], []

    def remove_stale_files(self) -> None:
        """Remove files that neither the manifest nor the one before it names."""
        named = {entry.name for entry in [*self.pieces, *self.states, *self._previous]}
        for file in self.folder.iterdir():
            if NAME.fullmatch(file.name) and file.name not in named:
                file.unlink()

    def _write(self, kind: str, what: str, place: int, state: Any) -> CheckpointFile | None:
        self._written += 1
        name = f"{kind}-{self._written:04d}.safetensors"
        with warn_if_unwritable(self.folder):
            return CheckpointFile(name, what, place, write_state(self.folder / name, state))
        return None

    def _write_manifest(self, pieces: list[CheckpointFile], states: list[CheckpointFile]) -> None:
        """Write the manifest, and remove files that neither it nor the previous one names."""
        file = self.folder / MANIFEST
        manifest = {
            "format": FORMAT,
            "written": self._written,
            "when": time.strftime("%Y-%m-%d %H:%M:%S"),
            "about": self.about,
            "software": environment(),
            "pieces": [entry.to_manifest() for entry in pieces],
            "states": [entry.to_manifest() for entry in states],
        }
        self.pieces, self.states = pieces, states
        with warn_if_unwritable(self.folder):
            if file.exists():
                os.replace(file, self.folder / PREVIOUS)
            write_json(file, with_checksum(manifest))
            self.remove_stale_files()
            self._previous = [*pieces, *states]

    def _read_manifest(self) -> tuple[dict[str, Any], Path]:
        """The newest manifest that is undamaged, and its file."""
        wrong: list[str] = []
        for name in (MANIFEST, PREVIOUS):
            file = self.folder / name
            try:
                found = read_json(file)
                if not isinstance(found, dict) or found.get("format") != FORMAT:
                    raise CheckpointError(f"{file} is no manifest of format {FORMAT}.")
                if found != with_checksum(found):
                    raise CheckpointError(f"{file} has another checksum than when it was written.")
                if not all(isinstance(found.get(key), kind) for key, kind in FIELDS.items()):
                    raise CheckpointError(f"{file} is not a file that flowvi wrote.")
            except CheckpointError as error:
                wrong.append(str(error))
            else:
                for words in wrong:
                    warnings.warn(f"{words} The fit continues from {file}.", stacklevel=3)
                return found, file
        raise CheckpointError(f"{' '.join(wrong)} There is no state to resume from.")


@contextmanager
def open_checkpoint(
    folder: Path | None, about: Mapping[str, Any], resume: bool = False
) -> Iterator[CheckpointFolder | None]:
    """Open and lock the checkpoint folder of a fit for the duration of the block.

    With several processes, the first one writes and all read; no process starts before all
    have read.

    Args:
        folder: Path of the folder, which is made if needed; None for no checkpoint.
        about: Facts that identify the fit, as JSON has them; a resumed fit must have the same.
        resume: Whether to continue the fit in the folder.

    Raises:
        CheckpointError: The folder is in use, holds another fit, or holds a fit although
            `resume` is false.
    """
    if folder is None:
        yield None
        return
    make_folder(folder, "a checkpoint")
    shelf = CheckpointFolder(folder, about)
    with lock_folder(folder) if distributed.rank() == 0 else _unlocked():
        if any((folder / name).exists() for name in (MANIFEST, PREVIOUS)):
            if not resume:
                raise CheckpointError(
                    f"{folder} holds the checkpoint of an earlier fit. Pass resume=True to go on "
                    "with it, or name another folder."
                )
            shelf.load_manifest()
        distributed.barrier()
        if distributed.rank() == 0:
            shelf.remove_stale_files()
        yield shelf


@contextmanager
def warn_if_unwritable(folder: Path) -> Iterator[None]:
    """Turn an error of writing, such as a full disk, into a warning."""
    try:
        yield
    except (OSError, CheckpointError) as error:
        reason = error_reason(error) if isinstance(error, OSError) else error
        warnings.warn(
            f"{folder}: the checkpoint could not be written ({reason}). The fit goes on, and what "
            "was written before stays.",
            stacklevel=6,
        )


def with_checksum(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with a checksum of its other entries."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True)
    return {**rest, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def check_same_fit(
    saved: Mapping[str, Any], here: Mapping[str, Any], folder: Path, where: str = ""
) -> None:
    """Refuse a checkpoint of another fit; the message names the first difference."""
    for key in [*saved, *(k for k in here if k not in saved)]:
        a, b = saved.get(key), here.get(key)
        name = f"{where} '{key}'".strip()
        if isinstance(a, dict) and isinstance(b, dict):
            check_same_fit(a, b, folder, name)
        elif not _equal(a, b):
            raise CheckpointError(
                f"{folder} is the checkpoint of another fit: {name} was {_or_absent(a)} there and "
                f"is {_or_absent(b)} here."
            )


def environment() -> dict[str, Any]:
    """Versions and hardware, on which the last bits of a result depend."""
    return {
        "flowvi": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "machine": f"{platform.node()} ({platform.machine()})",
        "threads": torch.get_num_threads(),
    }


def _equal(a: Any, b: Any) -> bool:
    # Rounding differs between machines.
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return a == b or abs(a - b) <= 1e-4 * (1 + abs(a)) or (a != a and b != b)
    return bool(a == b)


def _or_absent(value: Any) -> Any:
    return "absent" if value is None else value


@contextmanager
def _unlocked() -> Iterator[None]:
    yield
