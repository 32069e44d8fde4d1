"""Where `flowvi fit` spends its time, from the start of the process to the written results.

    python benchmarks/startup.py [MODEL.py] [--repeats 3]

Each run is a process of its own, on one thread and without a compiler. Seconds of processor time,
the median of the runs, so that other work on the machine counts little; what is inside another
line is indented below it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Lines of the table, and under which other line each is.
LINES = {
    "Python and torch": 0,
    "Pyro": 0,
    "the rest of flowvi and its commands": 0,
    "model file and capture": 0,
    "fit": 0,
    "look and start": 1,
    "training": 1,
    "checks": 1,
    "escalation beside these": 1,
    "draws, verdict and resampling": 0,
    "ArviZ, summary, posterior.nc": 0,
    "pictures and report": 0,
    "the rest": 0,
}
WHOLE = "from start to end"


def timed(spent: dict[str, float], line: str, owner: Any, name: str) -> None:
    """Have a function add the seconds of its calls to a line, those in others' calls left out."""
    inner: Callable[..., Any] = getattr(owner, name)

    def outer(*args: Any, **kwargs: Any) -> Any:
        began, others = time.process_time(), sum(spent.values())
        try:
            return inner(*args, **kwargs)
        finally:
            own = time.process_time() - began - (sum(spent.values()) - others)
            spent[line] = spent.get(line, 0.0) + own

    setattr(owner, name, outer)


def run(model: Path, out: Path) -> dict[str, float]:
    """One fit in this process, and the seconds of each line."""
    spent: dict[str, float] = {}

    def lap(line: str) -> None:
        spent[line] = time.process_time() - sum(spent.values())

    import torch

    lap("Python and torch")
    importlib.import_module("pyro")

    lap("Pyro")
    torch.set_num_threads(1)
    from flowvi.cli import fit as command
    from flowvi.cli import main, results
    from flowvi.draws import diagnose
    from flowvi.fitting import executors, fit
    from flowvi.fitting.restart import Restart

    lap("the rest of flowvi and its commands")
    timed(spent, "model file and capture", command, "load_target")
    timed(spent, "fit", fit, "fit")
    timed(spent, "look and start", Restart, "_start")
    timed(spent, "training", Restart, "train")
    timed(spent, "checks", Restart, "check")
    timed(spent, "escalation beside these", executors, "escalate")
    timed(spent, "draws, verdict and resampling", diagnose, "diagnose")
    timed(spent, "draws, verdict and resampling", command, "_report")
    for name in ("summary", "_netcdf"):
        timed(spent, "ArviZ, summary, posterior.nc", results, name)
    for name in ("_loss", "_pair", "write_report"):
        timed(spent, "pictures and report", results, name)
    with contextlib.suppress(SystemExit):
        main(["fit", str(model), "--out", str(out), "--quiet"])
    lap("the rest")
    inside = [line for line, depth in LINES.items() if depth]
    spent["fit"] += sum(spent.get(line, 0.0) for line in inside)
    return {**spent, WHOLE: time.process_time()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, nargs="?", default=ROOT / "models/eight_schools.py")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(run(options.model, Path(folder) / "out")))
        return
    found = []
    for _ in range(options.repeats):
        command = [sys.executable, __file__, str(options.model), "--one"]
        settings = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "FLOWVI_COMPILE": "off"}
        environment = {**os.environ, **settings}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"| {options.model.stem}, {options.repeats} runs | s | share |\n| --- | --- | --- |")
    whole = statistics.median(one[WHOLE] for one in found)
    for line in [*LINES, WHOLE]:
        seconds = statistics.median(one.get(line, 0.0) for one in found)
        name = "&nbsp;&nbsp;" * LINES.get(line, 0) + line
        print(f"| {name} | {seconds:.2f} | {100 * seconds / whole:.0f} % |")


if __name__ == "__main__":
    main()
