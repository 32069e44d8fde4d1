"""Save a fit and load it again: tensors as safetensors, the rest as JSON, no pickle."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from flowvi.draws import Draws, tabulate
from flowvi.fit import Fit
from flowvi.flows import FLOWS
from flowvi.guides import GUIDES, Guide, make_guide
from flowvi.target import Target

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
MANIFEST = "fit.json"
CHAINS = "chains.safetensors"


class CheckpointError(ValueError):
    """A folder does not hold a fit that can be used here."""


def save_fit(fit: Fit, folder: str | os.PathLike[str]) -> Path:
    """Write a fit to a folder.

    Args:
        fit: The fit.
        folder: Where to; it is made if it does not exist.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    for i, guide in enumerate(fit.guides):
        _write(path / f"guide_{i}.safetensors", _tensors(guide))
    _write(path / "history.safetensors", {k: torch.as_tensor(v) for k, v in fit.history.items()})
    own = {n: p for n, p in fit.target.named_parameters() if n.startswith("own_")}
    if own:
        _write(path / "target.safetensors", own)
    if fit.chains is not None:
        _write(path / CHAINS, _chain_arrays(fit.chains))
    manifest = {
        "format": FORMAT,
        "latents": latents(fit.target),
        "guides": len(fit.guides),
        "bounds": fit.bounds,
        "log": fit.log,
        "meta": fit.meta,
        "chains": None if fit.chains is None else fit.chains.meta,
    }
    # Written last: a folder with a manifest is a whole one.
    _replace(path / MANIFEST, json.dumps(manifest, indent=1).encode())
    return path


def load(folder: str | os.PathLike[str], target: Target, guide: Guide | None = None) -> Fit:
    """Read a fit that `Fit.save` wrote.

    Args:
        folder: Where it was written.
        target: The same model on the same data; its latent sites are compared.
        guide: For a fit of a guide of your own making, one of the same build.

    Raises:
        CheckpointError: The folder holds no fit, or one of another model; the
            message names the file or the site.
    """
    path = Path(folder)
    manifest = _manifest(path)
    _compare(manifest["latents"], latents(target), path)
    guides = []
    for i in range(manifest["guides"]):
        new = _build(manifest["meta"]["specs"][i], target, guide, path)
        _fill(new, path / f"guide_{i}.safetensors")
        guides.append(new)
    if (path / "target.safetensors").exists():
        _fill_own(target, path / "target.safetensors")
    history = {k: v.numpy() for k, v in _read(path / "history.safetensors").items()}
    meta, log, bounds = manifest["meta"], manifest["log"], manifest["bounds"]
    chains = manifest.get("chains")
    table = None if chains is None else _chains(target, path / CHAINS, chains)
    return Fit(target, guides, bounds, history, log, meta, table)


def _chain_arrays(chains: Draws) -> dict[str, Tensor]:
    return {
        name: torch.as_tensor(array)
        for name, array in {"z": chains.z, "log_q": chains.log_q, **chains.stats}.items()
    }


def _chains(target: Target, file: Path, meta: dict[str, Any]) -> Draws:
    """The table of saved chains, evaluated anew."""
    arrays = _read(file)
    z, log_q = arrays.pop("z"), arrays.pop("log_q")
    size = target.chunk()
    pieces = [zip(a.split(size), b.split(size), strict=True) for a, b in zip(z, log_q, strict=True)]
    stats = {name: value.numpy() for name, value in arrays.items()}
    with torch.no_grad():
        return tabulate(target, pieces, meta, stats)


def latents(target: Target) -> dict[str, Any]:
    """Name, shape, support and columns of each latent site, as JSON has them."""
    return {
        name: {
            "shape": list(site.shape),
            "support": repr(site.support),
            "columns": [target.slices[name].start, target.slices[name].stop],
        }
        for name, site in target.sites.items()
    }


def _manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder; give the one that fit.save wrote.")
    if not file.exists():
        raise CheckpointError(
            f"{path} holds no {MANIFEST}: it is no saved fit, or not a whole one."
        )
    try:
        manifest = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file} is not the JSON that fit.save wrote: {error}.") from None
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version != FORMAT:
        raise CheckpointError(f"{file} has format {version}; this flowvi reads format {FORMAT}.")
    return dict(manifest)


def _compare(saved: dict[str, Any], here: dict[str, Any], path: Path) -> None:
    for name in [*saved, *(n for n in here if n not in saved)]:
        if saved.get(name) != here.get(name):
            raise CheckpointError(
                f"{path} was fitted to another model: site '{name}' was "
                f"{saved.get(name, 'absent')} there and is {here.get(name, 'absent')} here."
            )


def _build(spec: dict[str, Any], target: Target, guide: Guide | None, path: Path) -> Guide:
    name = spec["name"]
    if name in GUIDES or name in FLOWS:
        new = make_guide(name, target.dim, **spec["sizes"])
    elif guide is not None:
        new = copy.deepcopy(guide)
    else:
        raise CheckpointError(
            f"{path} holds a guide of your own making ({name}); "
            "pass one of the same build: flowvi.load(folder, target, guide=...)."
        )
    return new.to(dtype=target.dtype, device=target.device)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().cpu().contiguous().clone() for k, v in module.state_dict().items()}


def _fill(module: nn.Module, file: Path) -> None:
    found, wanted = _read(file), module.state_dict()
    for name in [*wanted, *(n for n in found if n not in wanted)]:
        if name not in found or name not in wanted or found[name].shape != wanted[name].shape:
            came = tuple(found[name].shape) if name in found else "absent"
            want = tuple(wanted[name].shape) if name in wanted else "absent"
            raise CheckpointError(f"{file}: tensor '{name}' is {came}, but the guide's is {want}.")
    module.load_state_dict(found)


def _fill_own(target: Target, file: Path) -> None:
    found, wanted = _read(file), dict(target.named_parameters())
    for name, value in found.items():
        if name not in wanted or wanted[name].shape != value.shape:
            raise CheckpointError(f"{file}: parameter '{name}' does not fit {target.name}.")
        with torch.no_grad():
            wanted[name].copy_(value)


def _read(file: Path) -> dict[str, Tensor]:
    if not file.exists():
        raise CheckpointError(f"{file} is missing.")
    if file.stat().st_size == 0:
        raise CheckpointError(f"{file} is empty (0 bytes): an incomplete write?")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file} is not a file that fit.save wrote: {error}.") from None


def _write(file: Path, tensors: Mapping[str, Tensor]) -> None:
    whole = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    _replace(file, save(whole))


def _replace(file: Path, content: bytes) -> None:
    """Write a whole file or none: through a temporary one in the same folder."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, file)
