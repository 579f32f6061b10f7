"""Nothing runs code from data; what CI installs is named by hash; SECURITY.md is true."""

import ast
import pathlib
import re
import tomllib

import pytest

from tests.unit.test_docs import ROOT, repository_files

# Modules whose files run code when they are read, and calls that run a text.
MODULES = frozenset("pickle marshal shelve dill cloudpickle joblib yaml".split())
CALLS = frozenset("eval exec compile os.system os.popen torch.load pickle.loads".split())
KEYWORDS = {"shell": True, "allow_pickle": True}

# A file without any of these words is not parsed.
SUSPECT = re.compile(
    r"pickle|marshal|shelve|dill|joblib|yaml|\beval\b|\bexec\b|(?<![.\w])compile\(|os\.(system|popen)"
    r"|torch\.load|shell="
)

# "path: what" -> why it is no danger
ALLOWED = {
    "tests/unit/test_docs.py: exec in a text": "runs this repository's own documentation",
    **{
        f"tests/e2e/{name}.py: exec": "programs that tests/e2e/random_lines.py writes"
        for name in ("random_case", "test_random_programs", "test_explained_programs")
    },
}


def dangers(source):
    """What a Python text does that SECURITY.md says is not done, in order."""
    found = []
    if not SUSPECT.search(source):
        return found
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(node.module)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += [name] if name in CALLS else []
            found += [
                f"{k.arg}={value}"
                for k in node.keywords
                for value in (KEYWORDS.get(k.arg or ""),)
                if value is not None and ast.unparse(k.value) == str(value)
            ]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += ["exec in a text"] if re.search(r"\b(exec|eval)\(", node.value) else []
    return found


def test_nothing_runs_code_from_data():
    found = {
        f"{path.relative_to(ROOT).as_posix()}: {what}"
        for path in repository_files()
        if path.suffix == ".py" and path.name != pathlib.Path(__file__).name
        for what in dangers(path.read_text())
    }
    assert found - set(ALLOWED) == set()
    assert set(ALLOWED) - found == set(), "no longer there: remove it from ALLOWED"


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import pickle", ["pickle"]),
        ("def f():\n    from dill.source import x", ["dill.source"]),
        ("eval('1')", ["eval"]),
        ("torch.load(p)", ["torch.load"]),
        ("subprocess.run(x, shell=True)", ["shell=True"]),
        ("np.load(p, allow_pickle=True)", ["allow_pickle=True"]),
        ("run('-c', 'exec(x)')", ["exec in a text"]),
        ("subprocess.run(x, shell=False)\nre.compile('a')\nnp.load(p, allow_pickle=False)", []),
    ],
)
def test_each_danger_is_found(source, what):
    assert dangers(source) == what


def locked():
    """Package -> (version, number of hashes) in the lock of CI."""
    text = (ROOT / ".ci" / "requirements.txt").read_text()
    entries = re.findall(r"^([\w.-]+)==(\S+)((?: \\\n +--hash=sha256:[0-9a-f]{64})*)", text, re.M)
    return {name.lower(): (version, hashes.count("--hash")) for name, version, hashes in entries}


def test_the_lock_names_each_package_by_hash_and_no_host():
    text = (ROOT / ".ci" / "requirements.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith(("#", " "))]
    assert len(lines) == len(locked()) > 50
    assert all(count > 0 for _, count in locked().values())
    assert not re.search(r"https?:|file://|index-url|find-links|trusted-host", text)
    assert "--require-hashes --requirement .ci/requirements.txt" in (
        ROOT / ".ci" / "run"
    ).read_text()


def test_the_lock_is_within_the_ranges_of_the_project():
    """After a change of pyproject.toml: run .ci/lock."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    for requirement in map(Requirement, wanted):
        version, _ = locked()[requirement.name.lower()]
        assert requirement.specifier.contains(version, prereleases=True), (requirement, version)


def test_dependencies_have_upper_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    every = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    assert every and not [r for r in every if "<" not in r and "==" not in r]


def test_the_policy_names_files_that_exist():
    text = (ROOT / "SECURITY.md").read_text()
    names = re.findall(r"`([\w./]+\.(?:py|md|txt)|\.ci/\w+)`", text)
    assert names and not [name for name in names if not (ROOT / name).exists()]
