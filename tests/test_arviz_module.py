"""ArviZ is imported although another process does so at the same moment."""

import os
import subprocess
import sys
from pathlib import Path

# The stamp of the day is written, and its temporary file is gone: as after another process.
RACE = """
import pathlib

replace = pathlib.Path.replace


def lose(self, target):
    replace(self, target)
    if self.name == "daily_warning.tmp":
        print("lost")
    raise FileNotFoundError(str(self))


pathlib.Path.replace = lose
"""


def run_race(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    """A process whose cache is empty, and that loses the race for the stamp."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RACE + command],
        env=os.environ | {"XDG_CACHE_HOME": str(folder)},
        capture_output=True,
        text=True,
    )


def test_the_second_import_finds_the_stamp(tmp_path: Path) -> None:
    command = "from flowvi.compat.arviz_module import import_arviz\nprint(import_arviz().__name__)"
    done = run_race(tmp_path, command)
    assert done.returncode == 0, done.stderr
    said = done.stdout.split()
    # ArviZ 1 writes no stamp.
    assert said in (["lost", "arviz"], ["arviz"])
    if "lost" in said:
        plain = run_race(tmp_path / "other", "import arviz")
        assert "FileNotFoundError" in plain.stderr, "the race is no longer one"
