"""Save a fit and load it again: tensors as safetensors, the rest as JSON, no pickle."""

from __future__ import annotations

import copy
import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from flowvi.amortised import Amortised, amortised
from flowvi.arguments import path as path_of
from flowvi.files import CheckpointError, Seal, read_json, read_start, write_json, write_whole
from flowvi.files import folder as made
from flowvi.fit import Fit
from flowvi.guides import Guide, guide_names, make_guide
from flowvi.identity import latents
from flowvi.nested import Nested, NestedFit, inner_guide
from flowvi.randomness import own_randomness
from flowvi.row_fit import RowFit
from flowvi.states import check_finite, check_module, packed, read_module, read_tensors, tensors_of
from flowvi.tables import put_up, taken_down
from flowvi.target import LocalTarget, Target

FORMAT = 2
# Files of the first format have no checksums, and names without a part of them.
READABLE = (1, 2)
MANIFEST = "fit.json"
# The kinds of a fit that has latents for each row, alone or beside those that all rows share.
ROWS, NESTED = "rows", "nested"
HISTORY, OWN, CHAINS = "history", "target", "chains"
FIELDS = {"latents": dict, "guides": int, "bounds": list, "log": list, "meta": dict}
NAME = re.compile(r"[a-z_]+\d*(-[0-9a-f]{8})?\.safetensors")


def save_fit(fit: Fit, folder: str | os.PathLike[str]) -> Path:
    """Write a fit to a folder.

    Args:
        fit: The fit.
        folder: Where to; it is made if it does not exist.
    """
    path = made(folder, "a fit")
    parts = {f"guide_{i}": tensors_of(guide) for i, guide in enumerate(fit.guides)}
    parts[HISTORY] = {k: torch.as_tensor(v) for k, v in fit.history.items()}
    own: dict[str, Tensor] = {**fit.target.own_parameters()}
    if own:
        parts[OWN] = own
    if fit.chains is not None:
        parts[CHAINS] = taken_down(fit.chains)["arrays"]
    manifest = {
        "latents": latents(fit.target),
        "guides": len(fit.guides),
        "bounds": fit.bounds,
        "log": fit.log,
        "meta": fit.meta,
        "chains": None if fit.chains is None else fit.chains.meta,
    }
    return _save(path, parts, manifest)


def save_rows(fit: RowFit, folder: str | os.PathLike[str]) -> Path:
    """Write a fit of latents of rows to a folder."""
    manifest = {"kind": ROWS, "latents": latents(fit.target), "log": fit.log, "meta": fit.meta}
    return _save_rows(folder, [fit.guide], fit.history, fit.target, manifest)


def save_nested(fit: NestedFit, folder: str | os.PathLike[str]) -> Path:
    """Write a fit of latents of rows and of those that they share to a folder."""
    target = fit.density.target
    manifest = {"kind": NESTED, "latents": _all_latents(target), "log": fit.log, "meta": fit.meta}
    return _save_rows(folder, [fit.guide, fit.density.inner], fit.history, target, manifest)


def _save_rows(
    folder: str | os.PathLike[str],
    guides: Sequence[Guide],
    history: Mapping[str, Any],
    target: LocalTarget,
    manifest: dict[str, Any],
) -> Path:
    path = made(folder, "a fit")
    parts = {f"guide_{i}": tensors_of(guide) for i, guide in enumerate(guides)}
    parts[HISTORY] = {k: torch.as_tensor(v) for k, v in history.items()}
    own: dict[str, Tensor] = dict(target.named_parameters())
    if own:
        parts[OWN] = own
    return _save(path, parts, {**manifest, "guides": len(guides), "bounds": []})


def _all_latents(target: LocalTarget) -> dict[str, Any]:
    """Sites of a row, and those that all rows share."""
    shared = {} if target.shared is None else latents(target.shared)
    return {**shared, **latents(target)}


@overload
def load(folder: str | os.PathLike[str], target: Target, guide: Guide | None = None) -> Fit: ...


@overload
def load(
    folder: str | os.PathLike[str],
    target: LocalTarget,
    guide: Guide | None = None,
    inner: Amortised | None = None,
) -> RowFit | NestedFit: ...


def load(
    folder: str | os.PathLike[str],
    target: Target | LocalTarget,
    guide: Guide | None = None,
    inner: Amortised | None = None,
) -> Fit | RowFit | NestedFit:
    """Read a fit that `Fit.save`, `RowFit.save` or `NestedFit.save` wrote.

    Args:
        folder: Where it was written.
        target: The same model on the same data; its latent sites are compared.
        guide: For a fit of a guide of your own making, one of the same build.
        inner: For a nested fit, the same of the guide of a row.

    Raises:
        CheckpointError: The folder holds no fit, or one of another model; the
            message names the file or the site.
    """
    path = path_of("folder", folder)
    manifest = _manifest(path)
    kind = manifest.get("kind")
    _same_kind(kind in (ROWS, NESTED), isinstance(target, LocalTarget), path)
    files = _Files(path, manifest.get("files"))
    if isinstance(target, LocalTarget) and kind == NESTED:
        compare_latents(manifest["latents"], _all_latents(target), path)
        return _load_nested(files, manifest, target, guide, inner)
    compare_latents(manifest["latents"], latents(target), path)
    if isinstance(target, LocalTarget):
        return _load_rows(files, manifest, target, guide)
    guides = []
    for i in range(manifest["guides"]):
        file, seal = files.of(f"guide_{i}")
        with own_randomness():
            new = _build(manifest["meta"]["specs"][i], target, guide, file, seal)
        guides.append(new)
    if files.has(OWN):
        _fill_own(target, *files.of(OWN))
    history = _history(files)
    meta, log, bounds = manifest["meta"], manifest["log"], manifest["bounds"]
    chains = manifest.get("chains")
    table = None
    if chains is not None:
        table = put_up(target, {"arrays": _chains(target, files), "meta": chains})
    return Fit(target, guides, bounds, history, log, meta, table)


def read_record(
    folder: Path,
) -> tuple[dict[str, Any], dict[str, Any], tuple[str, ...], dict[str, Any]]:
    """Read what is written beside the guides of a saved fit, without its model.

    Returns:
        Facts about the fit, its history as arrays, its log, and its latent sites.

    Raises:
        CheckpointError: The folder holds no fit.
    """
    manifest = _manifest(folder)
    history = read_tensors(*_Files(folder, manifest.get("files")).of(HISTORY))
    arrays = {name: column.numpy() for name, column in history.items()}
    return manifest["meta"], arrays, tuple(manifest["log"]), manifest["latents"]


def _save(path: Path, parts: Mapping[str, Mapping[str, Tensor]], manifest: dict[str, Any]) -> Path:
    """Write the files of a fit, and the manifest that names them.

    Raises:
        OSError: The disk is full, say; the folder then holds what it held before.
    """
    before = {file.name for file in path.iterdir()}
    files: dict[str, dict[str, Any]] = {}
    try:
        for part, tensors in parts.items():
            files[part] = _write(path, part, tensors)
        # Written last: until then the folder holds what it held before.
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


def _load_rows(
    files: _Files, manifest: dict[str, Any], target: LocalTarget, guide: Guide | None
) -> RowFit:
    meta = manifest["meta"]
    spec = meta["specs"][0]
    file, seal = files.of("guide_0")
    if guide is not None:
        new = copy.deepcopy(guide)
    elif not spec.get("own") and spec.get("name") in guide_names():
        with own_randomness():
            new = amortised(target, spec["name"])
    else:
        raise CheckpointError(
            f"{file.parent} holds a guide of your own making ({spec.get('name')}); "
            "pass one of the same build: flowvi.load(folder, target, guide=...)."
        )
    new = new.to(dtype=target.dtype, device=target.device)
    read_module(file, new, seal)
    if files.has(OWN):
        _fill_own(target, *files.of(OWN))
    return RowFit(target, new, _history(files), manifest["log"], meta)


def _load_nested(
    files: _Files,
    manifest: dict[str, Any],
    target: LocalTarget,
    guide: Guide | None,
    inner: Amortised | None,
) -> NestedFit:
    meta, file = manifest["meta"], files.of("guide_1")
    specs, particles = meta["specs"], meta.get("particles")
    whole = len(specs) == 2 and all(isinstance(spec, dict) for spec in specs)
    if target.shared is None or not whole or not isinstance(particles, int):
        raise CheckpointError(f"{files.path} holds no nested fit of {target.name}.")
    spec, of_rows = specs
    sees_theta = bool(of_rows.get("sees_theta"))
    with own_randomness():
        theta = _build(spec, target.shared, guide, *files.of("guide_0"))
        if inner is not None:
            rows = copy.deepcopy(inner).to(dtype=target.dtype, device=target.device)
        elif of_rows.get("name") in guide_names():
            mixes = bool(of_rows.get("mixes"))
            rows = inner_guide(target, of_rows["name"], sees_theta, mixes)
        else:
            raise CheckpointError(
                f"{files.path} holds a guide of rows of your own making; pass one of the same "
                "build: flowvi.load(folder, target, inner=...)."
            )
    read_module(file[0], rows, file[1])
    if files.has(OWN):
        _fill_own(target, *files.of(OWN))
    density = Nested(target, rows, sees_theta)
    return NestedFit(density, theta, particles, _history(files), meta, list(manifest["log"]))


def _chains(target: Target, files: _Files) -> dict[str, Tensor]:
    """Draws of Markov chains (C, S, D) and what is known of each, (C, S)."""
    file, seal = files.of(CHAINS)
    arrays = read_tensors(file, seal)
    z = arrays.get("z", torch.empty(0))
    whole = z.dim() == 3 and z.shape[-1] == target.dim and "log_q" in arrays
    alike = all(a.shape[:2] == z.shape[:2] for a in arrays.values())
    if not (whole and alike and z.is_floating_point() and bool(z.isfinite().all())):
        raise CheckpointError(
            f"{file} has no finite draws of chains of {target.dim} numbers, and log_q of each."
        )
    return arrays


def _history(files: _Files) -> dict[str, Any]:
    file, seal = files.of(HISTORY)
    found = read_tensors(file, seal)
    shapes = {tuple(column.shape) for column in found.values()}
    if len(shapes) > 1 or any(len(shape) != 1 for shape in shapes):
        raise CheckpointError(f"{file} has no number for every step: columns {sorted(shapes)}.")
    return {name: column.numpy() for name, column in found.items()}


def _same_kind(there: bool, here: bool, path: Path) -> None:
    kinds = ("one vector of latents", "latents for each row (local=)")
    if there != here:
        raise CheckpointError(
            f"{path} was fitted to a model with {kinds[there]}; this target has {kinds[here]}."
        )


class _Files:
    """Names and seals of the files of a folder, by what they hold."""

    def __init__(self, path: Path, files: Mapping[str, Any] | None) -> None:
        self.path, self.files = path, files

    def has(self, part: str) -> bool:
        if self.files is None:
            return (self.path / f"{part}.safetensors").exists()
        return part in self.files

    def of(self, part: str) -> tuple[Path, Seal | None]:
        if self.files is None:
            return self.path / f"{part}.safetensors", None
        try:
            file = self.files[part]
            name, seal = str(file["name"]), Seal(int(file["size"]), str(file["sha256"]))
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{self.path / MANIFEST} names no file for '{part}'.") from None
        if not NAME.fullmatch(name):
            raise CheckpointError(f"{self.path / MANIFEST}: '{name}' is no name of a fit's file.")
        return self.path / name, seal


def _write(path: Path, part: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a file under a name that no other content has, so that none is overwritten."""
    content = packed(tensors)
    name = f"{part}-{hashlib.sha256(content).hexdigest()[:8]}.safetensors"
    return {"name": name, **write_whole(path / name, content)._asdict()}


def compare_latents(saved: Mapping[str, Any], here: Mapping[str, Any], where: object) -> None:
    """Refuse what was fitted to another model, by the first site that differs."""
    for name in [*saved, *(n for n in here if n not in saved)]:
        if saved.get(name) != here.get(name):
            raise CheckpointError(
                f"{where} was fitted to another model: site '{name}' was "
                f"{saved.get(name, 'absent')} there and is {here.get(name, 'absent')} here."
            )


def _manifest(path: Path) -> dict[str, Any]:
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


def _build(
    spec: dict[str, Any], target: Target, own: Guide | None, file: Path, seal: Seal | None
) -> Guide:
    """A guide as it was built, with the numbers of a file."""
    name, sizes = str(spec.get("name")), dict(spec.get("sizes") or {})
    if name in guide_names():
        _check_sizes(sizes, file, seal)
        try:
            with torch.device("meta"):
                # Without its numbers, it takes no memory.
                check_module(file, make_guide(name, target.dim, **sizes), seal)
            new = make_guide(name, target.dim, **sizes)
        except CheckpointError:
            raise
        except (TypeError, ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"{file} fits no guide '{name}' of {sizes}: {error}") from None
    elif own is not None:
        new = copy.deepcopy(own)
    else:
        raise CheckpointError(
            f"{file.parent} holds a guide of your own making ({name}); "
            "pass one of the same build: flowvi.load(folder, target, guide=...)."
        )
    new = new.to(dtype=target.dtype, device=target.device)
    read_module(file, new, seal)
    return new


def _check_sizes(sizes: Mapping[str, Any], file: Path, seal: Seal | None) -> None:
    """Refuse more layers than there are bytes in the file, before any are built."""
    read_start(file, 1, seal)
    for value in tree_leaves(dict(sizes)):
        if isinstance(value, int) and value > file.stat().st_size:
            raise CheckpointError(f"{file} is too small for a guide of {sizes}.")


def _fill_own(target: Target | LocalTarget, file: Path, seal: Seal | None) -> None:
    found, wanted = read_tensors(file, seal), dict(target.named_parameters())
    own = {name: value for name, value in found.items() if name in wanted}
    check_finite(file, own, wanted)
    for name, value in found.items():
        if name not in wanted or wanted[name].shape != value.shape:
            raise CheckpointError(f"{file}: parameter '{name}' does not fit {target.name}.")
        with torch.no_grad():
            wanted[name].copy_(value)
