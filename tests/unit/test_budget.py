"""Sizes that keep the code readable: lines per file and per function.

A function's docstring does not count. What is over its target must be listed in OVER_TARGET with
its size; entries may shrink freely, and are raised only on purpose.
"""

import ast
import pathlib

FILE_TARGET, FILE_HARD = 400, 600  # lines
FUNCTION_TARGET, FUNCTION_HARD = 40, 80  # lines, nested functions included

ROOT = pathlib.Path(__file__).parents[2]
SOURCES = ("sharding", "spmd", "models", "training", "train.py", "benchmarks", "tests")

# "path" or "path::function" -> lines
OVER_TARGET: dict[str, int] = {}


def function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    docstring = node.body[0] if ast.get_docstring(node) else None
    excluded = docstring.end_lineno - docstring.lineno + 1 if docstring else 0
    return node.end_lineno - node.lineno + 1 - excluded


def sizes() -> tuple[dict[str, int], dict[str, int]]:
    """Lines of every file and of every function, by "path" and "path::function"."""
    files, functions = {}, {}
    roots = [ROOT / source for source in SOURCES]
    for path in (
        path for root in roots for path in ([root] if root.is_file() else root.rglob("*.py"))
    ):
        name, text = path.relative_to(ROOT).as_posix(), path.read_text()
        files[name] = len(text.splitlines())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                key = f"{name}::{node.name}"
                functions[key] = max(functions.get(key, 0), function_lines(node))
    return files, functions


def check(found: dict[str, int], target: int, hard: int, allowed: dict[str, int]) -> list[str]:
    """Messages for what is over its budget, and for entries that are no longer needed."""
    wrong = []
    for name, lines in sorted(found.items()):
        if lines > hard:
            wrong.append(f"{name}: {lines} lines, over the hard limit of {hard}: split it")
        elif lines > max(target, allowed.get(name, 0)):
            wrong.append(
                f"{name}: {lines} lines, over {max(target, allowed.get(name, 0))}: split it"
            )
        elif name in allowed and lines <= target:
            wrong.append(f"{name}: {lines} lines, within the target: remove it from OVER_TARGET")
    return wrong


def largest(found: dict[str, int]) -> str:
    rows = sorted(found.items(), key=lambda item: -item[1])[:10]
    return "\n".join(f"{lines:5} {name}" for name, lines in rows)


def test_sizes_stay_within_budget():
    files, functions = sizes()
    print(f"ten largest files\n{largest(files)}\nten largest functions\n{largest(functions)}")
    wrong = check(files, FILE_TARGET, FILE_HARD, OVER_TARGET)
    wrong += check(functions, FUNCTION_TARGET, FUNCTION_HARD, OVER_TARGET)
    wrong += [f"{name}: gone; remove it" for name in OVER_TARGET if name not in files | functions]
    assert not wrong, "\n" + "\n".join(wrong)


def test_over_target_needs_an_entry_that_covers_it():
    assert check({"a": 41}, 40, 80, {}) == ["a: 41 lines, over 40: split it"]
    assert check({"a": 41}, 40, 80, {"a": 45}) == []
    assert check({"a": 46}, 40, 80, {"a": 45}) == ["a: 46 lines, over 45: split it"]
    assert check({"a": 81}, 40, 80, {"a": 90}) == [
        "a: 81 lines, over the hard limit of 80: split it"
    ]
    assert check({"a": 40}, 40, 80, {"a": 45}) == [
        "a: 40 lines, within the target: remove it from OVER_TARGET"
    ]


def test_docstrings_do_not_count():
    node = ast.parse('def f():\n    """One\n\n    two."""\n    return 1\n').body[0]
    assert function_lines(node) == 2
