"""The arrows between modules, read from the source: they run one way, and away from globals."""

import ast
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
    "tables": {"typing", "run", "batch"},
    "datasets": {"typing", "run", "batch", "tables"},
    "plotting": {"typing", "run", "batch"},
    "model": {"typing", "run", "batch", "metrics", "tables"},
}
"""What each package, or module beside them, may import of jaxnn besides itself."""


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


TRAINERS = {
    "random_search": "jaxnn.search.random_search",
    "perturbation_search": "jaxnn.chains.perturbation_search",
    "gradient_descent": "jaxnn.descent.gradient_descent",
}


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_can_be_read_in_fourteen_files(name):
    needed, left = set(), {TRAINERS[name]}
    while left:
        module = left.pop()
        needed.add(module)
        left |= {found for found in imports(module) if found in MODULES} - needed
    assert len(needed) <= 14, sorted(needed)
