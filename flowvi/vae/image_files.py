"""Files of images: arrays by name, in three splits, with grey levels 0 to 255."""

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

SPLITS = ("train", "val", "test")
SEED = 20110411
# Names of the splits in the names of .amat files.
AMAT = {"train": "train", "val": "valid", "test": "test"}
# Images of `chardata.mat` that are kept for validation, as by its authors.
OMNIGLOT_VAL = 1345
SIDE = 28

Arrays = dict[str, np.ndarray]


def digits() -> tuple[str, Arrays]:
    """The digits of scikit-learn, 8 x 8 with 17 grey levels, in an order without the writers'."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "Without a file the images are scikit-learn's digits; install it by "
            "`pip install flowvi[data]`, or name a file."
        ) from error
    found = load_digits()
    order = np.random.default_rng(SEED).permutation(len(found.images))
    levels = np.round(found.images[order] * (255 / 16)).astype(np.uint8)
    return "digits", _cut(levels, {"y": found.target[order]})


def read(path: Path, split: str | None, shares: bool = False) -> tuple[str, Arrays]:
    """The name of a data set and its arrays ``train_x``, ``val_x``, ``test_x`` and others.

    Args:
        path: A file, or the folder of ``.amat`` files.
        split: Which of the orders of an ``.npz`` file to cut.
        shares: Whether values from 0 to 1 will do, in place of grey levels.
    """
    if path.suffix == ".amat":
        path = path.parent
    if not path.exists():
        raise ValueError(f"There is no file {path}; give an .npz file of images.")
    if path.is_dir():
        name, arrays = path.resolve().name, _amat(path)
    else:
        name, arrays = path.stem, _mat(path) if path.suffix == ".mat" else _npz(path)
    orders = [key for key in arrays if key.startswith("perm_")]
    if split is not None and split not in orders:
        had = ", ".join(orders) or "none"
        raise ValueError(f"{path} has no order named '{split}'; it has {had}.")
    for key in ("x", *(f"{k}_x" for k in SPLITS)):
        if key in arrays and _is_zero_or_one(arrays[key]):
            arrays[key] = (255 * arrays[key]).astype(np.uint8)
    if "train_x" not in arrays and "x" in arrays:
        _check(path, "x", arrays["x"], shares)
        chosen = split or (orders[0] if orders else "")
        order = arrays[chosen] if chosen else np.arange(len(arrays["x"]))
        arrays = _cut(arrays["x"][order], {})
    for key in (f"{k}_x" for k in SPLITS):
        if key not in arrays:
            raise ValueError(
                f"{path} has no array '{key}'; it has {', '.join(arrays)}. Needed are train_x, "
                "val_x and test_x of shape (N, H, W) with grey levels 0 to 255, or x."
            )
        _check(path, key, arrays[key], shares)
    return name, arrays


def _npz(path: Path) -> Arrays:
    # For other files, NumPy's error message recommends unsafe loading.
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not an .npz file, or is damaged: numpy.savez writes one.")
    try:
        with np.load(path, allow_pickle=False) as held:
            return {key: held[key] for key in held.files}
    except Exception as error:  # of compression, or of what the bytes say
        raise ValueError(f"{path} is not an .npz file of arrays, or is damaged: {error}") from None


def _amat(folder: Path) -> Arrays:
    """Fixed black-and-white images, as text: a row of 784 zeros and ones for each."""
    arrays: Arrays = {}
    for split, word in AMAT.items():
        files = sorted(folder.glob(f"*{word}*.amat"))
        if len(files) != 1:
            found = ", ".join(f.name for f in files) or "none"
            raise ValueError(
                f"{folder} must hold one .amat file with '{word}' in its name, as "
                f"binarized_mnist_{word}.amat has; found {found}."
            )
        characters = np.frombuffer(files[0].read_bytes(), dtype=np.uint8)
        bits = characters[(characters == ord("0")) | (characters == ord("1"))] - ord("0")
        others = np.setdiff1d(characters, list(b"01 \t\r\n"))
        if len(others) or not len(bits) or len(bits) % SIDE**2:
            raise ValueError(
                f"{files[0]} must hold {SIDE**2} zeros and ones for each image and nothing else; "
                f"got {len(bits)}, and {len(others)} other characters."
            )
        bits = bits.reshape(-1, SIDE, SIDE)
        arrays |= {f"{split}_x": 255 * bits, f"{split}_bits": _packed(bits)}
    return arrays


def _mat(path: Path) -> Arrays:
    """OMNIGLOT or the Caltech silhouettes, as their authors hand them out."""
    import scipy.io

    try:
        held: Mapping[str, Any] = scipy.io.loadmat(path)
        for keys, make in MATLAB.items():
            if all(key in held for key in keys):
                return make(held)
    except Exception as error:  # of compression, or of what the bytes say
        raise ValueError(f"{path} is no MATLAB file of images, or is damaged: {error}") from None
    had = ", ".join(key for key in held if not key.startswith("__")) or "nothing"
    known = " or ".join(", ".join(keys) for keys in MATLAB)
    raise ValueError(f"{path} must hold {known}; it has {had}.")


def _omniglot(held: Mapping[str, Any]) -> Arrays:
    """Grey images by column, each a column of numbers from 0 to 1."""
    order = np.random.default_rng(SEED).permutation(held["data"].shape[1])
    train, val = np.split(held["data"].T[order], [len(order) - OMNIGLOT_VAL])
    parts = {"train": train, "val": val, "test": held["testdata"].T}
    return {
        f"{k}_x": _upright(np.round(255 * x).clip(0, 255).astype(np.uint8))
        for k, x in parts.items()
    }


def _silhouettes(held: Mapping[str, Any]) -> Arrays:
    """White shapes by column on black, kept as 0 on 1."""
    arrays: Arrays = {}
    for split in SPLITS:
        bits = 1 - _upright(np.asarray(held[f"{split}_data"], dtype=np.uint8))
        arrays |= {f"{split}_x": 255 * bits, f"{split}_bits": _packed(bits)}
        if f"{split}_labels" in held:
            arrays[f"{split}_y"] = np.ravel(held[f"{split}_labels"])
    return arrays


# Names of arrays that identify a MATLAB file -> its reader.
MATLAB: dict[tuple[str, ...], Callable[[Mapping[str, Any]], Arrays]] = {
    ("data", "testdata"): _omniglot,
    ("train_data", "val_data", "test_data"): _silhouettes,
}


def _upright(x: np.ndarray) -> np.ndarray:
    """Images (N, 784) that were written column by column, (N, 28, 28)."""
    return np.ascontiguousarray(x.reshape(-1, SIDE, SIDE).transpose(0, 2, 1))


def _packed(bits: np.ndarray) -> np.ndarray:
    return np.packbits(bits.reshape(len(bits), -1), axis=1)


def _check(path: Path, key: str, x: np.ndarray, shares: bool) -> None:
    """Refuse arrays that are no images; for values in [0, 1] the message has the remedy."""
    named = f"{path}: '{key}' must have shape (N, H, W)"
    if x.ndim != 3 or not x.size or x.dtype.kind not in "uif":
        raise ValueError(f"{named} and numbers; got {x.dtype} of shape {x.shape}.")
    least, most = x.min(), x.max()
    whole = x.dtype.kind in "ui" and least >= 0 and most <= 255
    unit = x.dtype.kind == "f" and least >= 0 and most <= 1
    if whole or (unit and shares):
        return
    came = f"got {x.dtype} of shape {x.shape} from {least:g} to {most:g}"
    if not unit:
        raise ValueError(
            f"{named} and whole grey levels 0 to 255, or values in [0, 1] for the likelihoods "
            f"continuous_bernoulli and gaussian; {came}."
        )
    raise ValueError(
        f"{named} and whole grey levels 0 to 255 for this likelihood; {came}. Values in [0, 1] "
        "are for --likelihood continuous_bernoulli or gaussian (in Python, load(path, 'grey')); "
        "for others save np.round(255 * x).astype(np.uint8)."
    )


def _is_zero_or_one(x: np.ndarray) -> bool:
    """Whether floats are 0 and 1 alone, and both: black and white, not grey."""
    return x.dtype.kind == "f" and np.array_equal(np.unique(x), [0, 1])


def _cut(levels: np.ndarray, others: Mapping[str, np.ndarray]) -> Arrays:
    """Cut rows into the three splits, the last two a tenth each, in hundreds of many."""
    unit = 100 if len(levels) >= 1000 else 1
    tests = unit * -(-len(levels) // (10 * unit))
    ends = [0, len(levels) - 2 * tests, len(levels) - tests, len(levels)]
    return {
        f"{split}_{key}": array[ends[i] : ends[i + 1]]
        for key, array in {"x": levels, **others}.items()
        for i, split in enumerate(SPLITS)
    }
