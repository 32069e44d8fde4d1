"""What earlier versions wrote is read: one folder for each format, made by this file.

    python tests/test_stored.py

writes the folders of the present formats; those of earlier ones stay as they are.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

import flowvi
from flowvi.fitting import fit_folder
from flowvi.runtime import checkpoint_folder
from flowvi.training import checkpointer

STORED = Path(__file__).parent / "stored"
STEPS, CUT = 12, 8
# Bounds of the whole fit by the version that wrote the checkpoint; later ones may start elsewhere.
BOUNDS = {
    "checkpoint-1": [
        *(-0.707555237971, -0.721938792644, -0.67689704426, -0.744523531434),
        *(-0.789112393661, -0.759560685129, -0.680107480916, -0.967600841994),
        *(-0.933409623485, -0.855415025446, -0.697738769263, -0.658521780687),
    ]
}


class CutOff(Exception):
    """What ends a fit in the middle."""


def banana() -> flowvi.Target:
    def log_prob(v: dict[str, Tensor]) -> Tensor:
        x, y = v["x"]
        return Normal(0.0, 1.0).log_prob(x) + Normal(x**2, 0.3).log_prob(y)

    return flowvi.from_density(log_prob, {"x": flowvi.Site((2,))})


def guide() -> flowvi.FlowGuide:
    torch.manual_seed(0)
    return flowvi.FlowGuide(2, flowvi.FLOWS["planar"](2, depth=2))


def fit(
    folder: Path | None = None, callback: Callable[[flowvi.Step], object] | None = None
) -> flowvi.Fit:
    return flowvi.fit(
        banana(),
        guide(),
        steps=STEPS,
        lr=1e-2,
        seed=3,
        progress=False,
        checkpoint=folder,
        resume=folder is not None,
        callback=callback,
        compile=False,
    )


def test_the_present_formats_are_stored():
    """A new format needs a folder of its own beside those of the earlier ones."""
    assert (STORED / f"fit-{fit_folder.FORMAT}").is_dir()
    assert (STORED / f"checkpoint-{checkpoint_folder.FORMAT}").is_dir()


@pytest.mark.parametrize("folder", sorted(STORED.glob("fit-*")), ids=lambda f: f.name)
def test_a_stored_fit_is_loaded(folder):
    stored = flowvi.load(folder, banana(), guide())

    assert stored.meta["steps"] == len(stored.history["bound"]) == STEPS
    d = flowvi.diagnose(stored.draw(4000, seed=1))
    # The stored bound is of 2000 other draws.
    assert abs(d.elbo - stored.bounds[0]) < 4 * d.elbo_se * 3**0.5


@pytest.mark.parametrize("folder", sorted(STORED.glob("checkpoint-*")), ids=lambda f: f.name)
@pytest.mark.filterwarnings("ignore:.*is resumed with other software")
def test_a_stored_checkpoint_is_gone_on_with(folder, tmp_path):
    """From its last step; with other software to rounding only."""
    shutil.copytree(folder, tmp_path / "run")
    seen: list[int] = []

    last = fit(tmp_path / "run", lambda step: seen.append(step.step))

    assert len(seen) == STEPS - CUT + 1
    np.testing.assert_allclose(last.history["bound"], BOUNDS[folder.name], rtol=1e-6)


def write(folder: Path) -> None:
    """A checkpoint of a fit that was cut off, without what is of this machine."""

    def stop(step: flowvi.Step) -> None:
        if step.step == CUT:
            raise CutOff

    try:
        fit(folder, stop)
    except CutOff:
        (folder / "lock").unlink()
    (folder / checkpoint_folder.PREVIOUS).unlink()
    manifest = json.loads((folder / checkpoint_folder.MANIFEST).read_text())
    manifest["software"]["machine"] = "another one"
    (folder / checkpoint_folder.MANIFEST).write_text(
        json.dumps(checkpoint_folder.with_checksum(manifest), indent=1)
    )
    named = {entry["name"] for entry in [*manifest["pieces"], *manifest["states"]]}
    for file in folder.glob("*.safetensors"):
        if file.name not in named:
            file.unlink()


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    checkpointer.EVERY = checkpointer.SPARED = 0.0
    for name in (f"fit-{fit_folder.FORMAT}", f"checkpoint-{checkpoint_folder.FORMAT}"):
        shutil.rmtree(STORED / name, ignore_errors=True)
    fit().save(STORED / f"fit-{fit_folder.FORMAT}")
    write(STORED / f"checkpoint-{checkpoint_folder.FORMAT}")
