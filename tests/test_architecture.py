"""Imports point downwards, importing flowvi changes nothing, and no text is run as code."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import flowvi
from flowvi.compat.arviz_groups import read_groups

PACKAGE = Path(flowvi.__file__).parent
FILES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}
# Packages from the bottom up. A package imports those of the rows above its own; packages of
# one row do not know each other, and the modules of one package do not import in a circle.
LAYERS = [
    {"flows", "runtime"},
    {"compat"},
    {"targets", "diagnostics"},
    {"guides", "bnn"},
    {"objectives", "draws", "initialization", "vae"},
    {"samplers"},
    {"training"},
    {"fitting"},
    {"interop", "plots", "amortized"},
    {"analysis"},
    {"reporting"},
    {"cli"},
]
FACES = {"__init__", "__main__", "_version"}
# Names that other people's programs rely on.
PUBLIC = {
    *("from_pyro", "from_density", "Site", "Target", "ModelError", "fit", "load", "Fit"),
    *("Draws", "diagnose", "bounds", "resample", "to_inference_data", "elbo", "iwelbo", "renyi"),
    *(
        "evidence",
        "compare",
        "neutra",
        "sbc",
        "amortize",
        "bayesian",
        "LIKELIHOODS",
        "PRIORS",
        "predict",
        "Blocks",
        "Multiplicative",
        "Prefixes",
    ),
    *("LocalTarget", "Amortised", "PerRow", "Minibatch", "RowFit", "wake_sleep"),
    *("pyro_guide", "IWELBO", "GuideDistribution", "report", "loo", "Blocks", "nested"),
    *("FLOWS", "GUIDES", "OBJECTIVES", "FlowGuide", "MeanField", "FullRank", "__version__"),
}
HEAVY = {"arviz", "matplotlib", "pandas", "xarray", "sklearn"}
IMPORT = """
import json, random, sys, warnings
import numpy, pyro, safetensors.torch, scipy.optimize, scipy.special, torch, tqdm

def state():
    return {
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "torch validates": torch.distributions.Distribution._validate_args,
        "pyro": {key: str(value) for key, value in pyro.settings.get().items()},
        "param store": list(pyro.get_param_store()),
        "handlers": len(pyro.poutine.runtime._PYRO_STACK),
        "torch generator": torch.get_rng_state().tolist(),
        "numpy generator": str(numpy.random.get_state()),
        "generator": str(random.getstate()),
        "filters": [str(f) for f in warnings.filters],
        "floating point errors": numpy.geterr(),
        "path": sys.path,
    }

before = state()
import flowvi
for name in flowvi.__all__:  # each is imported when it is first needed
    getattr(flowvi, name)
print(json.dumps([before, state(), sorted(sys.modules)]))
"""


def unit(path: Path) -> str:
    """The package to which a file belongs, or its own name at the root."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def dotted(name: str) -> str:
    """The module of a file, without `flowvi.`."""
    return name.removesuffix(".py").removesuffix("__init__").strip("/").replace("/", ".")


def imported(tree: ast.AST, modules: set[str], types: bool = False) -> Iterator[str]:
    """Modules of flowvi that a file imports, in functions too; for types alone, if asked."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not types:
            continue
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno} is a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] == "flowvi":
                inner = name.removeprefix("flowvi").lstrip(".")
                yield inner if inner in modules else inner.rpartition(".")[0]
        yield from imported(node, modules, types)


def upwards(sources: dict[str, str]) -> set[tuple[str, str]]:
    """(file, module that it imports) for imports of what is not below."""
    modules = {dotted(name) for name in FILES}
    height = {package: i for i, layer in enumerate(LAYERS) for package in layer}
    height["_version"] = -1
    return {
        (name, module)
        for name, text in sources.items()
        if (own := dotted(name).split(".")[0]) in height
        for module in imported(ast.parse(text), modules, types=True)
        if (other := module.split(".")[0]) != own and height.get(other, len(LAYERS)) >= height[own]
    }


def circle(sources: dict[str, str]) -> list[str]:
    """Modules that import each other in a circle; empty if there are none."""
    modules = {dotted(name) for name in sources}
    left = {dotted(n): {*imported(ast.parse(text), modules)} for n, text in sources.items()}
    left = {m: needs - {m} for m, needs in left.items()}
    count = len(left) + 1
    while len(left) < count:  # what imports nothing that is left, or is not imported, is in none
        count = len(left)
        needed = set().union(*left.values())
        left = {m: needs & left.keys() for m, needs in left.items() if m in needed}
        left = {m: needs for m, needs in left.items() if needs}
    return sorted(left)


SOURCES = {name: path.read_text() for name, path in FILES.items()}


def test_the_design_has_the_packages_in_their_order():
    design = (Path(__file__).parents[1] / "docs" / "design.md").read_text()
    table = design.split("## Layers")[1].split("\n## ")[0]

    rows = [line.split("|")[1:3] for line in table.splitlines() if re.match(r"\| \d", line)]
    named: dict[int, set[str]] = {}
    for number, packages in rows:
        named.setdefault(int(number), set()).update(re.findall(r"`([a-z_]+)/`", packages))

    assert [named[number] for number in sorted(named)] == LAYERS
    assert [int(number) for number, _ in rows] == sorted(int(number) for number, _ in rows)


def test_every_package_has_a_layer():
    assert {unit(path) for path in FILES.values()} - FACES == set().union(*LAYERS)


def test_no_module_lies_at_the_root():
    assert {name.removesuffix(".py") for name in FILES if "/" not in name} == FACES


def test_imports_point_downwards():
    assert not upwards(SOURCES)


def test_no_modules_import_each_other_in_a_circle():
    assert not circle({name: text for name, text in SOURCES.items() if name != "__init__.py"})


@pytest.mark.parametrize(
    "text",
    [
        "from flowvi.cli import output",
        "import flowvi.cli.output",
        "from flowvi import guides",
        "from flowvi.fitting.fit import fit",
        "from flowvi.diagnostics import psis",  # in the same row
        "from flowvi import fit",
        "def f():\n    from flowvi.training import trainer",
        "if TYPE_CHECKING:\n    from flowvi.guides.guide import Guide",
        "from flowvi.nowhere import anything",
    ],
)
def test_an_import_upwards_would_be_found(text):
    assert upwards({"targets/pyro/new.py": text})


def test_an_import_downwards_is_none_upwards():
    below = (
        "from flowvi._version import __version__\nfrom flowvi.runtime import memory\nimport torch"
    )

    assert not upwards({"targets/pyro/new.py": below})


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        ("import torch", "from flowvi.flows.one import x", []),
        ("from flowvi.flows.two import x", "from flowvi.flows.one import y", ["one", "two"]),
        ("from flowvi.flows import two", "def f():\n    import flowvi.flows.one", ["one", "two"]),
        (
            "from flowvi.flows.two import x",
            "if TYPE_CHECKING:\n    from flowvi.flows.one import y",
            [],
        ),
    ],
)
def test_a_circle_would_be_found(first, second, found):
    sources = {"flows/__init__.py": "", "flows/one.py": first, "flows/two.py": second}

    assert circle(sources) == [f"flows.{name}" for name in found]


def test_the_pages_name_files_that_exist():
    root = PACKAGE.parent
    pages = [*root.glob("*.md"), *(root / "docs").rglob("*.md"), root / "models" / "README.md"]
    named = {
        (page.name, path)
        for page in pages
        if page.name != "CHANGELOG.md"
        for path in re.findall(r"`(flowvi/[\w/]*(?:\.py|/))`", page.read_text())
    }

    assert named
    assert not {(page, path) for page, path in named if not (root / path).exists()}


def test_the_names_of_the_package_are_the_public_ones():
    assert set(dir(flowvi)) == set(flowvi.__all__)
    assert not {unit(path) for path in FILES.values()} & set(flowvi.__all__)


def test_what_reads_and_writes_arviz_groups_is_where_the_pages_named_it_first():
    assert import_module("flowvi.groups").read_groups is read_groups


@pytest.fixture(scope="module")
def imports() -> tuple[dict[str, object], dict[str, object], set[str]]:
    """State of a fresh process before and after `import flowvi`, and its modules."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True
    )
    before, after, modules = json.loads(done.stdout)
    return before, after, set(modules)


def test_importing_flowvi_changes_nothing_outside_it(imports):
    before, after, _ = imports

    assert after == before


def test_importing_flowvi_leaves_out_what_only_results_need(imports):
    _, _, modules = imports

    assert not modules & HEAVY


def declared() -> dict[str, str]:
    """Public names and their modules, as type checkers see them."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def test_names_are_imported_from_where_type_checkers_find_them():
    homes = {name: f"flowvi.{module}" for name, module in flowvi._HOMES.items()}

    assert homes == declared()
    assert {*homes, "__version__"} == set(flowvi.__all__)


def test_names_that_are_not_there_are_refused():
    assert not hasattr(flowvi, "realnvp") and not hasattr(flowvi, "_nothing")
    assert flowvi.plots is import_module("flowvi.plots")  # packages are found without an import


COMMANDS = {
    "help": (["--help"], 0, {"torch", "pyro", "arviz", "matplotlib", "scipy"}),
    "help of a command": (["fit", "--help"], 0, {"torch", "pyro", "arviz", "scipy"}),
    "list": (["list", "flows"], 0, {"torch", "pyro", "arviz", "scipy"}),
    "no file": (["fit", "nowhere.py", "--out", "out"], 2, {"torch", "pyro", "arviz", "scipy"}),
    "no guide": (["fit", "m.py", "--guide", "none"], 2, {"torch", "pyro", "arviz", "scipy"}),
    "no size": (["fit", "m.py", "--max-memory", "much"], 2, {"torch", "pyro", "scipy"}),
    "no command": (["fti"], 2, {"torch", "pyro", "arviz", "scipy"}),
}
COMMAND = """
import json, runpy, sys
sys.argv = ["flowvi", *sys.argv[1:]]
try:
    runpy.run_module("flowvi", run_name="__main__")
except SystemExit as end:
    print()
    print(json.dumps([end.code, sorted(sys.modules)]))
"""


@pytest.mark.parametrize(("words", "code", "left_out"), COMMANDS.values(), ids=COMMANDS)
def test_commands_import_what_they_need(words, code, left_out, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *words], capture_output=True, text=True, cwd=tmp_path
    )
    found, modules = json.loads(done.stdout.splitlines()[-1])

    assert found == code, done.stderr
    assert not left_out & set(modules)


def test_importing_flowvi_alone_imports_no_other_library():
    code = "import sys, flowvi; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert not {"torch", "pyro", "arviz", "matplotlib", "scipy"} & set(done.stdout.split())


def test_fitting_a_density_leaves_out_statistics_and_pictures():
    code = "import sys, flowvi; flowvi.fit, flowvi.from_density; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert not {"arviz", "matplotlib", "scipy"} & set(done.stdout.split())


def test_the_public_names_are_there():
    assert not PUBLIC - set(flowvi.__all__)
    assert all(hasattr(flowvi, name) for name in flowvi.__all__)


def dangers(tree: ast.AST) -> Iterator[str]:
    """Ways to run data as code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            roots = {name.split(".")[0] for name in names}
            yield from roots & {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
        elif isinstance(node, ast.Call):
            options = {k.arg: k.value for k in node.keywords}
            call = ast.unparse(node.func)
            if call in {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}:
                yield call
            if call == "torch.load" and ast.unparse(options.get("weights_only", node)) != "True":
                yield "torch.load without weights_only=True"
            if "shell" in options:
                yield "shell="


@pytest.mark.parametrize("name", FILES)
def test_no_text_is_run_as_code(name):
    found = set(dangers(ast.parse(FILES[name].read_text())))
    # What is to be compiled goes to the worker through a folder that only its owner can enter.
    allowed = (
        {"pickle"}
        if name in {"training/compiling/background.py", "training/compiling/worker.py"}
        else set()
    )

    assert not found - allowed


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "exec(text)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "subprocess.run('ls', shell=True)",
        "os.system('ls')",
    ],
)
def test_running_text_as_code_would_be_found(text):
    assert list(dangers(ast.parse(text)))


WINDOWS = """
import sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
import flowvi
for name in flowvi.__all__:
    getattr(flowvi, name)
import flowvi.cli, flowvi.cli.fit, flowvi.cli.results, flowvi.cli.vae_results
from flowvi.runtime import locks
from types import ModuleType
fake = ModuleType("msvcrt")
fake.LK_NBLCK, held = 2, []
def locking(handle, mode, count):
    if held:
        raise PermissionError(13, "Permission denied")
    held.append(handle)
fake.locking = locking
sys.modules["msvcrt"] = fake
locks.lock(0) if sys.stdin.seekable() else None
try:
    locks.lock(0)
except BlockingIOError:
    print("locked")
"""


def test_everything_is_imported_where_there_are_no_modules_of_posix(tmp_path):
    """As on Windows, whose locks are those of msvcrt."""
    file = tmp_path / "lock"
    file.touch()
    with file.open("r+") as handle:
        done = subprocess.run(
            [sys.executable, "-c", WINDOWS], stdin=handle, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "locked\n"
