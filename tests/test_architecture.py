"""Imports point downwards, importing flowvi changes nothing, and no text is run as code."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import flowvi

PACKAGE = Path(flowvi.__file__).parent
FILES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}
# Modules and packages from the bottom up; the parts of the first two layers stand alone.
LAYERS = [
    {"_version", "arguments", "parallel", "groups", "randomness", "files", "dispatch", "flat"},
    {"states", "memory", "adam", "statistics"},
    {"columns"},
    {"flows", "target", "diagnostics"},
    {"guides"},
    {"amortised", "blocks", "multiplicative"},
    {"objectives", "overlap", "compiling", "outside"},
    {"draws"},
    {
        *("fit", "run", "records", "training", "gradients", "judging", "escalation", "stopping"),
        *("schedule", "checkpoint", "threads", "init", "gaussians", "sweeps", "pathfinder", "look"),
        *("unbounded", "peaks"),
        *("modes", "symmetry", "coverage"),
        *("course", "journal", "shelf", "tables", "identity", "blame", "restarts"),
        *("tempering", "anneal", "bootstrap", "chains", "nuts"),
        *("minibatch", "row_training", "row_draws", "row_fit", "nested"),
        *("nested_start", "nested_training"),
    },
    {
        *("inference_data", "row_inference_data", "evidence", "compare", "neutra", "outcomes"),
        *("sbc", "row_sbc", "bnn", "saved", "loo", "predict", "netcdf"),
        *("pyro_guide", "row_pyro_guide", "pyro_parts", "pyro_elbo"),
    },
    {"vae", "plots"},
    {"report"},
    {"cli"},
]
ALONE = 4
FACES = {"__init__", "__main__"}
# Names that other people's programs rely on.
PUBLIC = {
    *("from_pyro", "from_density", "Site", "Target", "ModelError", "fit", "load", "Fit"),
    *("Draws", "diagnose", "bounds", "resample", "to_inference_data", "elbo", "iwelbo", "renyi"),
    *(
        "evidence",
        "compare",
        "neutra",
        "sbc",
        "bayesian",
        "LIKELIHOODS",
        "PRIORS",
        "predict",
        "Blocks",
        "Multiplicative",
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
print(json.dumps([before, state(), sorted(sys.modules)]))
"""


def unit(path: Path) -> str:
    """The module or package of the table of layers to which a file belongs."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Modules and packages of flowvi that a file imports, in functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("flowvi."))


def test_the_design_has_every_module_of_the_layers():
    design = (Path(__file__).parents[1] / "docs" / "design.md").read_text()
    table = design.split("## Layers")[1].split("\n## ")[0]

    named = {name.rstrip("/") for name in re.findall(r"`([a-z_]+/?)`", table)}

    assert named == set().union(*LAYERS) - {"_version"}


def test_every_module_has_a_layer():
    assert {unit(path) for path in FILES.values()} - FACES == set().union(*LAYERS)


@pytest.mark.parametrize("name", [name for name, path in FILES.items() if unit(path) not in FACES])
def test_imports_point_downwards(name):
    own = unit(FILES[name])
    height = next(i for i, layer in enumerate(LAYERS) if own in layer)
    below = set().union(*LAYERS[:height], {own} if height < ALONE else LAYERS[height])

    extra = set(imported(FILES[name])) - below

    assert not extra, f"{name} imports {extra}, which is not below it"


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
    allowed = {"pickle"} if name in {"compiling/background.py", "compiling/worker.py"} else set()

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
