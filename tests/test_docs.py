"""The site has every public name, and the notebooks are what their script says."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flowvi

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted({str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} - {"README.md"})
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


def code(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"][1:]


def in_script():
    """The cells that `make_notebooks.py` writes."""
    tree = ast.parse((DOCS / "make_notebooks.py").read_text())
    (node,) = (
        n.value
        for n in tree.body
        if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "NOTEBOOKS"
    )
    return ast.literal_eval(node)


@pytest.mark.parametrize("page", PAGES)
def test_the_first_page_leads_to_every_page(page):
    assert f"]({page})" in (DOCS / "README.md").read_text()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_what_its_script_writes_and_was_run(notebook):
    texts = in_script()[notebook.stem]
    cells = json.loads(notebook.read_text())["cells"]

    assert code(notebook) == [t for t in texts if not (t[0] == "#" or t[0].isupper())]
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["execution_count"] is not None
            assert all(output["output_type"] != "error" for output in cell["outputs"])
    assert notebook.stat().st_size < 60_000


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_code_of_a_notebook_runs(notebook, default, monkeypatch):
    def short(target, guide="auto", **settings):
        return fit(target, "fullrank", steps=1, **settings)

    fit = flowvi.fit
    monkeypatch.setattr(flowvi, "fit", short)
    names: dict[str, object] = {"__name__": "notebook"}

    for cell in code(notebook):
        exec(compile(cell, str(notebook), "exec"), names)


def test_formulas_of_docstrings_become_those_of_the_site():
    griffe = pytest.importorskip("griffe", reason="no mkdocstrings to read docstrings with")
    spec = importlib.util.spec_from_file_location("mathematics", DOCS / "mathematics.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    found = module.dollars(flowvi.loo.__doc__)

    assert griffe and "math" not in found
    assert found.count("$$") == 2 and "$y_n$" in found


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="no mkdocs to build with")
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "reference/index.html").read_text()
    for name in set(flowvi.__all__) - {"__version__"}:
        assert re.search(rf'id="flowvi\.(\w+\.)*{name}"', reference), name
    estimators = (tmp_path / "explain/estimators/index.html").read_text()
    assert "<math" in estimators and r"\(" not in estimators
    pages = [path.read_text() for path in tmp_path.rglob("*.html")]
    assert not [
        page for page in pages if re.search(r'<(script|link)[^>]*(src|href)="https?://', page)
    ]
    assert "ELBO" in (tmp_path / "notebooks/eight_schools/index.html").read_text()


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_every_page_is_in_the_navigation(page):
    assert re.search(rf": {re.escape(page)}$", (ROOT / "mkdocs.yml").read_text(), re.M)


def test_formulas_are_drawn_without_a_network():
    pytest.importorskip("latex2mathml", reason="comes with the extra docs")
    spec = importlib.util.spec_from_file_location("formulas", DOCS / "formulas.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    found = module.on_page_content(r'<p><span class="arithmatex">\(\log w &lt; 1\)</span></p>')

    assert found.startswith('<p><span class="arithmatex"><math') and "<mspace" in found
    assert "\\" not in found


def test_notebooks_become_pages_with_what_they_printed():
    pytest.importorskip("mkdocs", reason="comes with the extra docs")
    spec = importlib.util.spec_from_file_location("notebook_pages", DOCS / "notebook_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    page = module.page(DOCS / "notebooks/eight_schools.ipynb")

    assert page.startswith("# Eight schools") and ">trust</span>" in page
    assert "data:image/png;base64," in page
