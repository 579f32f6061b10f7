"""The notebooks run from top to bottom, in a process of their own, and their results display."""

import ast
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


DISPLAY = """
def display(x):
    html = getattr(x, "_repr_html_", None)
    print(repr(x) if html is None else f"<html of {len(html())} characters>")
"""


def code_cells(path: pathlib.Path) -> list[str]:
    cells = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def script(path: pathlib.Path) -> str:
    """The cells as one program; the last expression of a cell is displayed, as a notebook does."""
    lines = [DISPLAY]
    for cell in code_cells(path):
        body = ast.parse(cell).body
        if body and isinstance(body[-1], ast.Expr):
            shown = ast.Expr(ast.Call(ast.Name("display", ast.Load()), [body[-1].value], []))
            body[-1] = ast.copy_location(shown, body[-1])
        lines.append(ast.unparse(ast.fix_missing_locations(ast.Module(body, []))))
    return "\n".join(lines)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    program = tmp_path / "notebook.py"
    program.write_text(script(path))
    done = subprocess.run(
        [sys.executable, str(program)], cwd=path.parent, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "<html of" in done.stdout  # the report shows itself


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_kept_without_results(path: pathlib.Path) -> None:
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
