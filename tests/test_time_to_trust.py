"""The cost of a fit, in counts that do not depend on the machine, does not creep back."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import ten_fits
from counting import counted

import flowvi

ROOT = Path(__file__).parents[1]
STORED = json.loads((ROOT / "benchmarks" / "time_to_trust.json").read_text())
# The cheapest; `python benchmarks/time_to_trust.py --quick` counts all.
QUICK = ("poisson regression", "poisson, full rank", "gamma density", "normal, mean field")
# Rounding differs between machines, and with it where a plateau is seen.
SLACK = 0.1


@pytest.mark.parametrize("name", QUICK)
def test_a_fit_takes_no_more_than_it_did(name):
    found = ten_fits.count(name)
    stored = dict(STORED[name])

    assert found.verdict == stored.pop("verdict")
    for what, count in asdict(found.counts).items():
        assert count == pytest.approx(stored[what], rel=SLACK), what


def test_the_table_has_every_fit():
    assert STORED.keys() == ten_fits.FITS.keys()


def test_steps_and_points_are_counted():
    target = ten_fits.normal()
    with counted() as counts:
        fit = flowvi.fit(target, "fullrank", steps=7, seed=0, compile=False, progress=False)
    taken = []
    for n in (50, 150):
        with counted() as found:
            fit.draw(n)
        taken.append(asdict(found))

    assert counts.steps == 7 == fit.meta["steps"]
    assert counts.points > 7 * 64 and counts.flow_points > 7 * 64
    # Besides, a few draws measure memory.
    assert taken[1]["points"] - taken[0]["points"] == 100
    assert taken[1]["flow_points"] - taken[0]["flow_points"] == 100
    assert not taken[1]["steps"]
