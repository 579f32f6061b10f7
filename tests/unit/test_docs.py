"""Documentation is true: its Python blocks run, and it names no place on somebody's machine."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FENCE = re.compile(r"^```(\S*)\s*(.*)$")
# joined here so that this file does not match itself
MACHINE_PATHS = tuple("/" + tail for tail in ("work/", "tmp/v/", "root/", "home/"))
SKIPPED_DIRECTORIES = {"__pycache__", "build", "dist"}


def repository_files() -> list[pathlib.Path]:
    """Files of the repository: what git tracks or would track, so that no run's output counts."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode == 0:
        paths = [ROOT / line for line in listed.stdout.splitlines()]
        return sorted(path for path in paths if path.is_file())
    return unpacked_files()


def unpacked_files() -> list[pathlib.Path]:
    """Files of a source archive; of the directories that start with a dot, .ci only."""
    found = []
    for directory, names, files in os.walk(ROOT):
        names[:] = [
            name
            for name in names
            if name == ".ci" or not (name.startswith(".") or name in SKIPPED_DIRECTORIES)
        ]
        found += [pathlib.Path(directory, file) for file in files]
    return sorted(found)


def documents() -> list[pathlib.Path]:
    return [path for path in repository_files() if path.suffix == ".md"]


def runnable(text: str) -> str:
    """The runnable Python of a document, each line at the line number it has there.

    Blocks marked ```python run, one after the other in one program; ```python no-run does not.
    """
    lines, running = [], False
    for line in text.splitlines():
        fence = FENCE.match(line)
        if fence:
            opens = fence.group(1) == "python" and "no-run" not in fence.group(2)
            running = opens and not running
        lines.append(line if running and not fence else "")
    return "\n".join(lines)


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_python_blocks_run(path, tmp_path):
    source = runnable(path.read_text())
    if not source.strip():
        pytest.skip("no Python blocks")
    run = "import sys; name, source = sys.argv[1:]; exec(compile(source, name, 'exec'), {})"
    done = subprocess.run(
        [sys.executable, "-c", run, str(path), source],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_blocks_keep_their_line_numbers():
    text = "a\n```python\nx = 1\n```\n```python no-run\ny = 2\n```\n```bash\nls\n```\n"
    assert runnable(text) == "\n\nx = 1\n\n\n\n\n\n\n"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_the_documented_test_command_is_the_one_ci_runs(name):
    if not (ROOT / name).exists():
        pytest.skip(f"there is no {name} yet")
    command = re.search(r"^python -m pytest.*$", (ROOT / ".ci" / "run").read_text(), re.M)
    assert command and command.group() in (ROOT / name).read_text().splitlines()


def test_nothing_names_a_path_of_one_machine():
    found = []
    for path in repository_files():
        text = path.read_bytes().decode("utf-8", errors="replace")
        for number, line in enumerate(text.splitlines(), 1):
            if any(re.search(rf"(?<![\w.~]){re.escape(p)}", line) for p in MACHINE_PATHS):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n" + "\n".join(found)
