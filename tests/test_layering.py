"""The arrows between modules, read from the source: they run one way, and away from globals."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import jaxnn

ROOT = Path(jaxnn.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts) for path in ROOT.rglob("*.py")
)
MAY_IMPORT = {
    "typing": set(),
    "run": {"typing"},
    "optim": {"typing", "run"},
    "search": {"typing", "run"},
    "chains": {"typing", "run", "optim"},
    "descent": {"typing", "run", "optim"},
    "gradients": {"typing", "run"},
    "batch": {"typing", "run"},
    "metrics": {"typing", "run", "batch"},
    "datasets": {"typing", "run", "batch"},
    "plotting": {"typing", "run", "batch"},
    "model": {"typing", "run", "batch", "metrics"},
}
"""What each package, or module beside them, may import of jaxnn besides itself."""

NAMESPACES = [module for name in jaxnn.__all__ if inspect.ismodule(module := getattr(jaxnn, name))]


def source(module):
    path = ROOT.parent.joinpath(*module.split("."))
    return ast.parse(path.with_suffix(".py").read_text(encoding="utf-8"))


def imports(module):
    """Every module that a module names in an import, wherever in it the import stands."""
    found = set()
    for node in ast.walk(source(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            assert node.module is not None
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in inside if name in MODULES} or {node.module}
    return {name.removesuffix(".__init__") for name in found}


def unit(module):
    """The package of a module, or the module's own name where it stands beside the packages."""
    return module.removesuffix(".__init__").split(".")[1]


def attributes(module):
    """Dotted names that a module's code uses, such as `jax.config.update`."""
    return {
        ast.unparse(node) for node in ast.walk(source(module)) if isinstance(node, ast.Attribute)
    }


def test_the_modules_are_found():
    assert {"jaxnn.batch", "jaxnn.model.mlp", "jaxnn.run.loop"} <= set(MODULES)
    assert {unit(module) for module in MODULES if module != "jaxnn.__init__"} == set(MAY_IMPORT)


@pytest.mark.parametrize("module", [name for name in MODULES if name != "jaxnn.__init__"])
def test_imports_run_one_way(module):
    ours = {unit(name) for name in imports(module) if name.split(".")[0] == "jaxnn"}
    assert ours <= {unit(module), *MAY_IMPORT[unit(module)]}


def test_nothing_imports_in_a_circle():
    graph = {module: {name for name in imports(module) if name in MODULES} for module in MODULES}
    settled: set[str] = set()
    while len(settled) < len(graph):
        ready = {name for name, below in graph.items() if below - {name} <= settled} - settled
        assert ready, f"circle among {sorted(set(graph) - settled)}"
        settled |= ready


@pytest.mark.parametrize("module", MODULES)
def test_only_known_packages_are_imported_and_nothing_experimental(module):
    named = imports(module)
    outside = {name.split(".")[0] for name in named} - {"jaxnn"} - sys.stdlib_module_names
    assert outside <= {"jax", "numpy", "scipy", "tqdm"} | (
        {"matplotlib"} if module == "jaxnn.plotting" else set()
    )
    private = {name for name in named if name.startswith(("jax.experimental", "jax._src"))}
    assert not private
    assert not {a for a in attributes(module) if a.startswith(("jax.experimental", "jax._src"))}


@pytest.mark.parametrize("module", MODULES)
def test_no_global_state_is_read_or_set_and_nothing_is_printed(module):
    used = attributes(module)
    assert not {name for name in used if name.startswith(("jax.config", "os.environ"))}
    assert {name for name in used if name.startswith("np.random.")} <= {"np.random.RandomState"}
    calls = [node.func for node in ast.walk(source(module)) if isinstance(node, ast.Call)]
    assert "print" not in {func.id for func in calls if isinstance(func, ast.Name)}
    assert not {name for name in used if name.endswith((".stdout", "plt.show", "debug.print"))}
    assert not any(isinstance(node, ast.Global) for node in ast.walk(source(module)))


@pytest.mark.parametrize("module", [jaxnn, *NAMESPACES], ids=lambda module: module.__name__)
def test_public_names_are_listed_and_exist(module):
    assert len(set(module.__all__)) == len(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


def test_the_package_shows_its_public_names_and_nothing_else():
    assert {name for name in dir(jaxnn) if not name.startswith("__")} == set(jaxnn.__all__)


def test_importing_the_package_loads_no_matplotlib_and_leaves_jax_as_it_was():
    code = """
import sys, jax
before = dict(jax.config.values)
import jaxnn
assert "matplotlib" not in sys.modules, "matplotlib was imported"
assert dict(jax.config.values) == before, "jax.config was changed"
assert "plotting" in dir(jaxnn)
jaxnn.plotting
assert "matplotlib" in sys.modules
try:
    jaxnn.no_such_name
except AttributeError as error:
    assert "no_such_name" in str(error)
else:
    raise AssertionError("no AttributeError")
"""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
