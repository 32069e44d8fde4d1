"""The examples of the README and the documentation run, and their links lead somewhere."""

import re
import shutil
from importlib import import_module
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import hasty as hurry
from quick import quick

from flowvi.cli import main

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
PAGES = {str(p.relative_to(ROOT)): p for p in FILES}
FENCE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s#:]+)(?:#[^)]*)?\)")
COMMAND = re.compile(r"^flowvi (\w+)(.*)$", re.MULTILINE)


@pytest.fixture
def few_steps(monkeypatch, hasty) -> None:
    """Fits that do not say how long they are to be take few steps, from whatever start."""
    quick(monkeypatch, steady_steps=30, most_stages=1)
    monkeypatch.setattr(import_module("flowvi.fitting.escalation"), "ATTEMPTS", ())


@pytest.fixture(scope="session")
def fitted(tmp_path_factory) -> Path:
    """A folder in which `flowvi fit` has left the results of eight schools."""
    folder = tmp_path_factory.mktemp("docs")
    model, out = ROOT / "models/eight_schools.py", folder / "results/eight_schools"
    options = ["--steps", "30", "--draws", "400", "--quiet"]
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        done = CliRunner().invoke(main, ["fit", str(model), "--out", str(out), *options])
    assert done.exit_code in (0, 3), done.output
    return folder


@pytest.fixture
def results(fitted, tmp_path) -> Path:
    """A copy of that folder, where no other page has written."""
    return Path(shutil.copytree(fitted, tmp_path / "docs"))


# Readers have torch's single precision; one page is enough to see that double works.
# These pages take ten seconds or more each.
LONG = ("docs/verdict.md", "docs/results.md", "docs/notebook.md", "docs/weights.md")
RUNS = [
    pytest.param(name, "single", marks=[pytest.mark.slow] if name in LONG else [])
    for name, page in PAGES.items()
    if FENCE.search(page.read_text())
]
RUNS.append(pytest.param("README.md", "double"))


@pytest.mark.parametrize(("page", "default"), RUNS, indirect=["default"])
def test_the_examples_of_a_page_run(page, default, few_steps, results, monkeypatch):
    monkeypatch.chdir(results)
    monkeypatch.syspath_prepend(ROOT)
    names: dict[str, object] = {"__name__": "example"}

    for example in FENCE.finditer(PAGES[page].read_text()):
        # Blank lines before the example make the line numbers of a traceback those of the page.
        start = PAGES[page].read_text()[: example.start(1)].count("\n")
        exec(compile("\n" * start + example[1], page, "exec"), names)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    for link in LINK.findall(PAGES[page].read_text()):
        assert (PAGES[page].parent / link).exists(), f"{page} links to {link}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_the_options_that_are_shown(page):
    for command, rest in COMMAND.findall(PAGES[page].read_text()):
        usage = CliRunner().invoke(main, [command, "--help"]).stdout

        assert all(option in usage for option in re.findall(r"--\w+", rest))


def test_the_readme_s_commands_are_scripts():
    scripts = re.findall(r"^sh (\S+)$", PAGES["README.md"].read_text(), re.MULTILINE)

    assert scripts == ["scripts/fit.sh", "scripts/test.sh"]
    assert all((ROOT / script).is_file() for script in scripts)
    assert scripts[1] in (ROOT / ".ci/run").read_text()
