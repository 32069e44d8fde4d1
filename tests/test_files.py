"""Files are whole or not there, and what was not written by flowvi is refused by name."""

import json
import math
import os
import pickle
import resource
import stat
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import nn

from flowvi.runtime import files
from flowvi.runtime import tensors as states
from flowvi.runtime.files import CheckpointError, Checksum


def test_what_was_written_is_read(tmp_path):
    file = tmp_path / "a"

    seal = files.write_atomic(file, b"first")
    assert files.read_checked(file, seal) == b"first"
    assert files.read_checked(file, files.write_atomic(file, b"second")) == b"second"
    assert os.listdir(tmp_path) == ["a"]


def test_the_mode_of_a_file_and_the_users_mask_are_kept(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(b"1")
    old.chmod(0o640)
    mask = os.umask(0o027)
    try:
        files.write_atomic(old, b"2")
        files.write_atomic(new, b"2")
    finally:
        os.umask(mask)

    assert stat.S_IMODE(old.stat().st_mode) == 0o640
    assert stat.S_IMODE(new.stat().st_mode) == 0o640


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    real, link = tmp_path / "elsewhere" / "real", tmp_path / "link"
    real.write_bytes(b"old")
    link.symlink_to(real)

    files.write_atomic(link, b"new")

    assert link.is_symlink()
    assert real.read_bytes() == b"new"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_neither_written_nor_read(tmp_path, make):
    make(tmp_path / "odd")

    with pytest.raises(OSError, match="no regular file"):
        files.write_atomic(tmp_path / "odd", b"1")
    with pytest.raises(CheckpointError, match="no regular file"):
        files.read_checked(tmp_path / "odd")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_at_any_point_leaves_the_old_file(tmp_path, monkeypatch, call):
    file = tmp_path / "a"
    files.write_atomic(file, b"old")

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fails)
        with pytest.raises(OSError, match="No space"):
            files.write_atomic(file, b"new")

    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_disk_that_is_full_leaves_the_old_file(tmp_path):
    file = tmp_path / "a"
    files.write_atomic(file, b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            files.write_atomic(file, bytes(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def states_to_write() -> list[object]:
    generator = torch.Generator().manual_seed(0)
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    tensors = [torch.randint(0, 2, (3, 2), generator=generator).to(kind) for kind in kinds]
    odd = [torch.tensor([math.nan, math.inf, -0.0]), torch.tensor(1 / 3), torch.zeros(0, 4)]
    values = [1 / 3, math.nan, -math.inf, 10**30, True, None, "", "ü/\n", {"tensor": "0"}]
    return [
        *values,
        {"a": tensors, "b": {"dict": [odd], 3: "number", "": []}},
        [[[]], {}, {"x": odd[0].expand(2, 3).mT}],
    ]


@pytest.mark.parametrize("state", states_to_write(), ids=repr)
def test_a_state_is_read_as_it_was_written_to_the_bit(tmp_path, state):
    file = tmp_path / "state"

    seal = states.write_state(file, state)

    assert_same(states.read_state(file, seal), state)


def assert_same(a: object, b: object) -> None:
    assert type(a) is type(b)
    if isinstance(b, torch.Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert (
            a.numpy(force=True).tobytes() == b.numpy(force=True).tobytes()
            if (a.dtype != torch.bfloat16)
            else torch.equal(a, b)
        )
    elif isinstance(b, dict):
        assert list(a) == list(b)
        for key in b:
            assert_same(a[key], b[key])
    elif isinstance(b, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b or (a != a and b != b)


def test_a_module_is_filled_with_what_fits_it(tmp_path):
    torch.manual_seed(0)
    one, other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    one(torch.randn(5, 3))
    file = tmp_path / "module"
    seal = files.write_atomic(file, states.serialize(states.cpu_state_dict(one)))

    states.read_module(file, other, seal)

    assert all(torch.equal(a, other.state_dict()[k]) for k, a in one.state_dict().items())
    with pytest.raises(CheckpointError, match=r"'weight' is \(3,\).*guide's is \(4,\)"):
        states.read_module(file, nn.BatchNorm1d(4), seal)
    with pytest.raises(CheckpointError, match=r"'bias' is .* but the guide's is absent"):
        states.read_module(file, nn.BatchNorm1d(3, affine=False), seal)
    with pytest.raises(CheckpointError, match="'running_mean' is absent"):
        states.load_tensors(other, {"weight": torch.ones(3), "bias": torch.ones(3)}, file)


def test_every_flipped_bit_is_seen(tmp_path):
    file = tmp_path / "state"
    seal = states.write_state(file, {"x": torch.arange(4.0)})
    whole = file.read_bytes()

    for at in np.random.default_rng(0).integers(0, 8 * len(whole), 40):
        changed = bytearray(whole)
        changed[at // 8] ^= 1 << (at % 8)
        file.write_bytes(changed)
        with pytest.raises(CheckpointError, match="state"):
            states.read_state(file, seal)


# What others may put in the place of a file.


def _header(text: bytes, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text


class Runs:
    """Would write a file when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.system, ("touch ran",)


def _described(**entries: object) -> bytes:
    return _header(json.dumps(entries).encode()) + bytes(8)


BILLION = {"dtype": "F64", "shape": [10**9], "data_offsets": [0, 8]}
OBJECTS = {"dtype": "O", "shape": [1], "data_offsets": [0, 8]}
FOREIGN = {
    "nothing": b"",
    "one byte": b"\0",
    "text": b"bounds, not tensors",
    "random bytes": np.random.default_rng(0).bytes(5000),
    "JSON": b'{"format": 1}',
    "a pickle": pickle.dumps(Runs()),
    "a pickle as the header": _header(pickle.dumps(Runs())),
    "a huge header": _header(b"{}", 2**40),
    "a header beyond the end": _header(b"{}", 2**20),
    "a header without end": _header(b'{"x":' * 100_000),
    "a list as the header": _header(b"[1, 2]"),
    "a billion numbers in eight bytes": _described(x=BILLION),
    "objects": _described(x=OBJECTS),
    "an offset beyond the end": _described(x={**BILLION, "shape": [1], "data_offsets": [0, 80]}),
    "a negative shape": _described(x={**BILLION, "shape": [-1]}),
    "a shape of text": _described(x={**BILLION, "shape": "long"}),
    "two in one place": _described(x={**BILLION, "shape": [1]}, y={**BILLION, "shape": [1]}),
    "a state of unknown tensors": save({}, {"state": '{"tensor": "../x"}'}),
    "a state of no pairs": save({}, {"state": '{"dict": [1]}'}),
    "a state that goes on": save({}, {"state": "[" * 900 + "]" * 900 + "]"}),
}


@pytest.mark.parametrize("reader", [states.read_state, states.read_tensors])
@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_file_is_refused_by_name(tmp_path, monkeypatch, content, reader):
    monkeypatch.chdir(tmp_path)
    if reader is states.read_tensors and b"state" in content[:60]:
        pytest.skip("tensors without their text are read")
    file = tmp_path / "file.safetensors"
    file.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    with pytest.raises(CheckpointError, match=r"file\.safetensors"):
        reader(file)

    assert os.listdir(tmp_path) == ["file.safetensors"]
    # In kilobytes; the test process itself is no smaller for it.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_a_file_with_a_hole_of_a_terabyte_is_not_read(tmp_path):
    file = tmp_path / "sparse"
    with file.open("wb") as out:
        out.write(_header(json.dumps({"weight": BILLION}).encode()))
        out.truncate(2**40)

    with pytest.raises(CheckpointError, match=r"'weight' is \(1000000000,\)"):
        states.read_module(file, nn.Linear(2, 1, bias=False))
    with pytest.raises(CheckpointError, match="1099511627776 bytes where 80 were"):
        states.read_tensors(file, Checksum(80, ""))
    with pytest.raises(CheckpointError, match="longer than any"):
        files.read_json(file)


# Folders.

HOLD = """
import pathlib, sys
from flowvi.runtime.files import lock_folder
with lock_folder(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_belongs_to_one_run_until_that_dies(tmp_path):
    (tmp_path / ".a.0123abcd.part").write_bytes(b"left over")
    (tmp_path / ".mine").write_bytes(b"kept")
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout.readline() == b"held\n"
        with (
            pytest.raises(CheckpointError, match=f"in use by .*process {owner.pid} on "),
            files.lock_folder(tmp_path),
        ):
            pass
        owner.kill()
        owner.wait()

    with files.lock_folder(tmp_path):
        assert sorted(os.listdir(tmp_path)) == [".mine", "lock"]


def test_a_lock_that_points_elsewhere_is_not_followed(tmp_path):
    outside = tmp_path / "outside"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").symlink_to(outside)

    with (
        pytest.raises(CheckpointError, match="cannot be locked"),
        files.lock_folder(tmp_path / "run"),
    ):
        pass

    assert not outside.exists()
