"""Who may import whom: the layers of the project, bottom to top.

A module may import modules of lower layers and, when its entry is a package (`name.*`), other
modules of that package. Modules side by side in one layer do not import each other.
"""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SOURCES = ("sharding", "spmd", "models", "training", "train.py", "benchmarks")
PRIVATE_JAX_HOME = "sharding._jax"

# Bottom to top. `name.*` is the module and everything below it; other entries are one module.
LAYERS = (
    (
        "sharding._jax.*", "sharding.collector", "sharding.errors", "sharding.local",
        "sharding.monoid", "sharding.nodes", "spmd.caller", "spmd.simulate",
    ),
    ("sharding.mesh", "sharding.parts"),
    ("sharding.spec",),
    ("sharding.region",),
    ("sharding.rule",),
    ("sharding.project", "sharding.names"),
    ("sharding.rules.*", "sharding.annotate", "sharding.custom"),
    ("sharding.op",),
    ("sharding.program",),
    ("sharding.provenance", "sharding.resolve"),
    ("sharding.decide", "sharding.reach"),
    ("sharding.propagation", "sharding.stated"),
    ("sharding.own_steps",),
    ("sharding.explain",),
    ("sharding",),
    ("spmd.chips",),
    ("spmd.topology",),
    ("spmd.hardware",),
    ("spmd.cost",),
    ("spmd.collectives", "spmd.mesh_text", "spmd.options"),
    ("spmd.arguments",),
    ("spmd.devices",),
    ("spmd.partition.*", "spmd.parallel.*"),
    ("spmd.estimate.*", "spmd.boundary", "spmd.annotations"),
    ("spmd.chains",),
    ("spmd.streams",),
    ("spmd.target",),
    ("spmd.regather",),
    ("spmd.planning",),
    ("spmd.pipeline.*",),
    ("spmd.plan.*", "spmd.reporting.*", "spmd.runtime.*"),
    ("spmd.explaining.*",),
    ("spmd.compiled",),
    ("spmd.stages",),
    ("spmd.tracing", "spmd.executable", "spmd.call", "spmd.refs", "spmd.checking.*"),
    ("spmd.dispatch", "spmd.golden"),
    ("spmd.check", "spmd.testing"),
    ("spmd.ahead.*",),
    ("spmd",),
    ("spmd.cli.*", "spmd.pytest_plugin"),
    ("spmd.__main__",),
    ("models.*",),
    ("training.*",),
    ("train", "benchmarks.*"),
)


def python_files() -> list[pathlib.Path]:
    roots = [ROOT / source for source in SOURCES]
    return sorted(
        path
        for root in roots
        for path in ([root] if root.is_file() else root.rglob("*.py"))
        if "__pycache__" not in path.parts
    )


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def entry_of(module: str) -> str | None:
    """The entry of LAYERS that a module belongs to: the longest that matches."""
    entries = [entry for layer in LAYERS for entry in layer]
    matching = [
        entry
        for entry in entries
        if module == entry.removesuffix(".*")
        or (entry.endswith(".*") and module.startswith(entry.removesuffix("*")))
    ]
    return max(matching, key=len, default=None)


def height(entry: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if entry in layer)


def imports(path: pathlib.Path) -> list[tuple[int, str]]:
    """(line, module) for everything a file imports, inside functions too, fully named."""
    found = []
    package = module_name(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found += [(node.lineno, _member(source, alias.name)) for alias in node.names]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "jax._src":
            found.append((node.lineno, "jax._src"))
    return found


def _member(source: str, name: str) -> str:
    """`from source import name` reads a module of that name when there is one."""
    path = ROOT.joinpath(*source.split("."))
    is_module = (path / f"{name}.py").exists() or (path / name).is_dir()
    return f"{source}.{name}" if is_module or source == "jax" else source


def is_ours(module: str) -> bool:
    return module.split(".")[0] in {source.removesuffix(".py") for source in SOURCES}


def violations(path: pathlib.Path) -> list[str]:
    """What a file imports that its layer may not, as messages."""
    module = module_name(path)
    own = entry_of(module)
    where = path.relative_to(ROOT)
    if own is None:
        return [
            f"{where}: {module} is in no layer; add it to LAYERS in {pathlib.Path(__file__).name}"
        ]
    wrong = []
    for line, target in imports(path):
        if target.startswith("jax._src") and not module.startswith(PRIVATE_JAX_HOME):
            wrong.append(f"{where}:{line}: {target} may be imported by {PRIVATE_JAX_HOME} only")
        if module.split(".")[0] == "sharding" and target.split(".")[0] == "spmd":
            wrong.append(f"{where}:{line}: sharding may not import {target}")
        if own == "models.*" and target.startswith("spmd."):
            wrong.append(f"{where}:{line}: models may use the public `spmd` only, not {target}")
        entry = entry_of(target) if is_ours(target) else own
        if entry != own and (entry is None or height(entry) >= height(own)):
            wrong.append(f"{where}:{line}: {module} may not import {target}: not a lower layer")
    return wrong


def test_every_entry_is_listed_once():
    entries = [entry for layer in LAYERS for entry in layer]
    assert len(entries) == len(set(entries))


def test_modules_import_lower_layers_only():
    wrong = [message for path in python_files() for message in violations(path)]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "text", "message"),
    [
        ("sharding/spec.py", "import sharding.rule", "not a lower layer"),
        ("sharding/mesh.py", "from spmd.simulate import simulate", "sharding may not"),
        ("sharding/mesh.py", "def f():\n    from jax._src import core", "may be imported by"),
        ("sharding/mesh.py", "import jax\njax._src.core", "may be imported by"),
        ("models/new.py", "from spmd.stages import jit", "public `spmd` only"),
        ("sharding/surprise.py", "", "is in no layer"),
    ],
)
def test_each_kind_of_violation_is_found(module, text, message, monkeypatch, tmp_path):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / module
    path.parent.mkdir()
    path.write_text(text)
    assert message in "".join(violations(path))
