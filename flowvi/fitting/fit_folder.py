"""The files of a saved fit: tensors and JSON, no pickle."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowvi.draws.draws import Draws
from flowvi.draws.storage import to_state
from flowvi.fitting.identity import latents
from flowvi.guides.guide import Guide
from flowvi.runtime.files import (
    CheckpointError,
    Checksum,
    make_folder,
    read_json,
    write_atomic,
    write_json,
)
from flowvi.runtime.tensors import cpu_state_dict, read_tensors, serialize
from flowvi.targets import LocalTarget

FORMAT = 2
# The first format has no checksums, neither in its manifest nor in its file names.
READABLE = (1, 2)
MANIFEST = "fit.json"
# Kinds of fits with latents for each row: rows alone, or rows and shared latents.
ROWS, NESTED = "rows", "nested"
# Kind of fits with local latents that are integrated.
STRUCTURED = "structured"
HISTORY, OWN, CHAINS = "history", "target", "chains"
FIELDS = {"latents": dict, "guides": int, "bounds": list, "log": list, "meta": dict}
NAME = re.compile(r"[a-z_]+\d*(-[0-9a-f]{8})?\.safetensors")


class Contents(NamedTuple):
    """Contents of a saved fit.

    Attributes:
        guides: The guides; each has a file of its own.
        own: Parameters of the model, by name.
        history: Columns with one number for each step or epoch.
        latents: Latent sites, in the form of JSON.
        log: Decisions, a line each.
        meta: JSON-able facts.
        kind: Empty for shared latents.
        bounds: Bound of each guide.
        chains: Draws of Markov chains, if the fit ended with them.
    """

    guides: Sequence[Guide]
    own: Mapping[str, Tensor]
    history: Mapping[str, Any]
    latents: dict[str, Any]
    log: list[str]
    meta: dict[str, Any]
    kind: str = ""
    bounds: Sequence[float] = ()
    chains: Draws | None = None


def save(fit: Contents, folder: str | os.PathLike[str]) -> Path:
    """Write a fit to a folder.

    Args:
        fit: The contents of the fit.
        folder: The folder; it is created if it does not exist.
    """
    path = make_folder(folder, "a fit")
    parts: dict[str, Mapping[str, Tensor]] = {
        f"guide_{i}": cpu_state_dict(guide) for i, guide in enumerate(fit.guides)
    }
    parts[HISTORY] = {k: torch.as_tensor(v) for k, v in fit.history.items()}
    if fit.own:
        parts[OWN] = fit.own
    if fit.chains is not None:
        parts[CHAINS] = to_state(fit.chains)["arrays"]
    manifest = {
        **({"kind": fit.kind} if fit.kind else {}),
        "latents": fit.latents,
        "guides": len(fit.guides),
        "bounds": list(fit.bounds),
        "log": fit.log,
        "meta": fit.meta,
        "chains": None if fit.chains is None else fit.chains.meta,
    }
    return _save(path, parts, manifest)


def all_latents(target: LocalTarget) -> dict[str, Any]:
    """Latent sites of a row, and those that all rows share."""
    shared = {} if target.shared is None else latents(target.shared)
    return {**shared, **latents(target)}


def read_record(
    folder: Path,
) -> tuple[dict[str, Any], dict[str, Any], tuple[str, ...], dict[str, Any]]:
    """Read a saved fit without its guides and its model.

    Returns:
        Facts about the fit, its history as arrays, its log, and its latent sites.

    Raises:
        CheckpointError: The folder holds no fit.
    """
    manifest = read_manifest(folder)
    history = read_tensors(*FitFiles(folder, manifest.get("files")).of(HISTORY))
    arrays = {name: column.numpy() for name, column in history.items()}
    return manifest["meta"], arrays, tuple(manifest["log"]), manifest["latents"]


def _save(path: Path, parts: Mapping[str, Mapping[str, Tensor]], manifest: dict[str, Any]) -> Path:
    """Write the files of a fit, and the manifest that lists them.

    Raises:
        OSError: A file cannot be written; the folder then keeps its earlier contents.
    """
    before = {file.name for file in path.iterdir()}
    files: dict[str, dict[str, Any]] = {}
    try:
        for part, tensors in parts.items():
            files[part] = _write(path, part, tensors)
        # The manifest is written last: until then the folder keeps its earlier contents.
        write_json(path / MANIFEST, {"format": FORMAT, **manifest, "files": files})
    except BaseException:
        _remove(path, {file["name"] for file in files.values()} - before)
        raise
    kept = {file["name"] for file in files.values()}
    _remove(path, {f.name for f in path.iterdir() if NAME.fullmatch(f.name)} - kept)
    return path


def _remove(path: Path, names: Iterable[str]) -> None:
    for name in names:
        with suppress(OSError):
            (path / name).unlink(missing_ok=True)


class FitFiles:
    """Names and checksums of the files of a folder, by the part they hold."""

    def __init__(self, path: Path, files: Mapping[str, Any] | None) -> None:
        self.path, self.files = path, files

    def has(self, part: str) -> bool:
        if self.files is None:
            return (self.path / f"{part}.safetensors").exists()
        return part in self.files

    def of(self, part: str) -> tuple[Path, Checksum | None]:
        if self.files is None:
            return self.path / f"{part}.safetensors", None
        try:
            file = self.files[part]
            name, seal = str(file["name"]), Checksum(int(file["size"]), str(file["sha256"]))
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{self.path / MANIFEST} names no file for '{part}'.") from None
        if not NAME.fullmatch(name):
            raise CheckpointError(f"{self.path / MANIFEST}: '{name}' is no name of a fit's file.")
        return self.path / name, seal


def _write(path: Path, part: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a file whose name depends on its content, so that no file is overwritten."""
    content = serialize(tensors)
    name = f"{part}-{hashlib.sha256(content).hexdigest()[:8]}.safetensors"
    return {"name": name, **write_atomic(path / name, content)._asdict()}


def compare_latents(saved: Mapping[str, Any], here: Mapping[str, Any], where: object) -> None:
    """Raise a CheckpointError that names the first site that differs from the saved model."""
    for name in [*saved, *(n for n in here if n not in saved)]:
        if saved.get(name) != here.get(name):
            raise CheckpointError(
                f"{where} was fitted to another model: site '{name}' was "
                f"{saved.get(name, 'absent')} there and is {here.get(name, 'absent')} here."
            )


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of a folder; raise a CheckpointError if it is unreadable."""
    file = path / MANIFEST
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder; give the one that fit.save wrote.")
    if not file.exists():
        raise CheckpointError(
            f"{path} holds no {MANIFEST}: it is no saved fit, or not a whole one."
        )
    manifest = read_json(file)
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version not in READABLE:
        raise CheckpointError(
            f"{file} has format {version}; this flowvi reads format {READABLE[0]} to {FORMAT}."
        )
    whole = all(isinstance(manifest.get(key), kind) for key, kind in FIELDS.items())
    specs = manifest["meta"].get("specs") if whole else None
    bounds = manifest.get("bounds", [])
    if not manifest.get("kind") and whole:
        number = all(isinstance(b, float | int) for b in bounds)
        whole = number and len(bounds) == manifest["guides"] > 0
    if not whole or not isinstance(specs, list) or len(specs) != manifest["guides"]:
        raise CheckpointError(f"{file} is not a file that flowvi wrote: parts of it are missing.")
    return dict(manifest)
