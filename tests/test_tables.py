"""Tables and streams as rows of a model: read once, in order, as they are; else refused."""

import os

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

import flowvi
from flowvi.runtime import columns, memory, tables
from flowvi.targets import streams

ROWS = 30
X = np.linspace(-1, 1, ROWS).round(3)


class Stream(IterableDataset):
    """Rows that can only be iterated."""

    def __init__(self, length=None, item=lambda x, i: (torch.tensor(x), torch.tensor(i))):
        self.length, self.item = length, item

    def __iter__(self):
        return (self.item(x, i) for i, x in enumerate(X))


class Known(Stream):
    def __len__(self):
        return ROWS


def rows(x, i):
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.fixture
def table():
    numbers = {"x": X, "n": np.arange(ROWS), "yes": X > 0}
    return pd.DataFrame({**numbers, "word": ["a", "b", "c"] * (ROWS // 3)})


@pytest.mark.parametrize("ending", ["csv", "tsv", "csv.gz", "parquet"])
def test_a_table_comes_back_as_it_was(table, tmp_path, ending, monkeypatch):
    monkeypatch.setattr(streams, "PIECE", 7)
    file = tmp_path / f"t.{ending}"
    if ending == "parquet":
        pytest.importorskip("pyarrow")
        table.to_parquet(file)
    else:
        table.to_csv(file, index=False, sep="\t" if ending == "tsv" else ",")

    pd.testing.assert_frame_equal(flowvi.read_table(file), table)
    found = flowvi.read_rows(file, ["n", "x", "yes"], size=ROWS)

    assert [*found] == ["n", "x", "yes"]
    for name, column in found.items():
        np.testing.assert_array_equal(column.numpy(), table[name].to_numpy())
        assert column.numpy().dtype == table[name].to_numpy().dtype
    with pytest.raises(ValueError, match=f"has {ROWS} rows, not the 8 of size"):
        flowvi.read_rows(file, ["n"], size=8)
    with pytest.raises(ValueError, match=r"Column 'word' of .* holds strings"):
        flowvi.read_rows(file)
    with pytest.raises(ValueError, match="has no column 'm'; its columns are x, n, yes, word"):
        flowvi.read_table(file, ["m"])


def test_what_is_missing_in_a_later_part_is_not_made_a_number(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(streams, "PIECE", 4)
    file = tmp_path / "t.parquet"
    pd.DataFrame({"n": pd.array([1, 2, 3, 4, 5, None], "Int64")}).to_parquet(file)
    with pytest.raises(ValueError, match=r"Column 'n' of .* has missing values among whole"):
        flowvi.read_rows(file)


def test_files_that_are_no_tables_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"no table that is known by its ending; expected one of"):
        flowvi.read_table(tmp_path / "t.xlsx")
    with pytest.raises(ValueError, match=r"cannot be read as a table: .*No such file"):
        flowvi.read_table(tmp_path / "t.csv")
    (tmp_path / "t.parquet").write_text("x\n1\n")
    monkeypatch.setattr(tables, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'flowvi\[parquet\]', or save"):
        flowvi.read_table(tmp_path / "t.parquet")
    with pytest.raises(TypeError, match="source must be a torch IterableDataset, or the path"):
        flowvi.read_rows(3)


@pytest.mark.parametrize("loader", [False, True])
def test_a_stream_is_read_in_order(loader, monkeypatch):
    monkeypatch.setattr(streams, "ITEMS", 7)
    stream = DataLoader(Stream(), batch_size=5) if loader else Stream()

    x, i = flowvi.read_rows(stream, size=ROWS)

    np.testing.assert_array_equal(x.numpy(), X)
    np.testing.assert_array_equal(i.numpy(), np.arange(ROWS))
    for size, words in ((ROWS + 1, f"has {ROWS} rows, not the 31"), (9, "more rows than the 9")):
        with pytest.raises(ValueError, match=words):
            flowvi.read_rows(stream, size=size)
    with pytest.raises(ValueError, match="size must be the number of rows of a stream"):
        flowvi.read_rows(stream)


def test_items_of_a_stream_hold_the_same_numbers():
    named = flowvi.read_rows(Stream(item=lambda x, i: {"x": x}), size=ROWS)
    np.testing.assert_array_equal(named["x"].numpy(), X)
    with pytest.raises(ValueError, match="must hold numbers; got str"):
        flowvi.read_rows(Stream(item=lambda x, i: "a"), size=ROWS)


def test_a_large_stream_lies_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(memory, "table_bytes", lambda: 0)
    made = []
    on_disk = columns._on_disk
    monkeypatch.setattr(columns, "_on_disk", lambda *args: made.append(args) or on_disk(*args))
    x, _ = flowvi.read_rows(Stream(), size=ROWS)
    assert len(made) == 2 and os.listdir(tmp_path) == []
    np.testing.assert_array_equal(x.numpy(), X)


@pytest.mark.parametrize("kind", ["with a length", "read", "table"])
def test_a_fit_of_rows_takes_them(kind, tmp_path, table):
    if kind == "table":
        table.to_csv(tmp_path / "t.csv", index=False)
        given = [*flowvi.read_rows(tmp_path / "t.csv", ["x", "n"]).values()]
    else:
        given = [Known()] if kind == "with a length" else [*flowvi.read_rows(Stream(), size=ROWS)]

    target = flowvi.from_pyro(rows, *given, local="row")
    fit = flowvi.fit(target, "meanfield", epochs=1, batch_size=10, progress=False)

    assert target.rows == ROWS
    np.testing.assert_array_equal(target.observations()["x"].numpy(), X)
    assert fit.draw(10)["z"].shape == (1, 10, ROWS)
    with pytest.raises(flowvi.ModelError, match=r"does not say how many rows it has: pass flowvi"):
        flowvi.from_pyro(rows, Stream(), local="row")
