"""Devices, strictness and fixtures for all tests.

Tests run on simulated CPU devices whatever the machine has. With `--accelerator` they run on the
real ones, and the tests in `tests/device` run too.
"""

import difflib
import os
import pathlib

import pytest

# The verifier between stages is on in every test; spmd reads this when it is imported.
os.environ.setdefault("SPMD_VERIFY", "1")

from spmd import stages  # noqa: E402
from spmd.partition import verify  # noqa: E402
from spmd.simulate import simulate  # noqa: E402
from tests import fast_compile  # noqa: E402

# Where the package is installed, its pytest plugin has imported them before the line above.
stages.ENABLED = verify.ENABLED = os.environ["SPMD_VERIFY"] not in ("", "0")

pytest_plugins = ["spmd.pytest_plugin"]

NUM_DEVICES = 8
GOLDEN = pathlib.Path(__file__).parent / "golden"
TIERS = ("device", "multihost")  # tests of tests/<tier> are marked with it


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden")
    parser.addoption("--accelerator", action="store_true", help="use the machine's accelerators")


def pytest_configure(config: pytest.Config) -> None:
    """Fixes the devices before any test module can start JAX's backend."""
    if not config.getoption("--accelerator"):
        os.environ["JAX_PLATFORMS"] = "cpu"
        fast_compile.use()
    simulate(NUM_DEVICES)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks tests with the tier whose directory they are in."""
    no_accelerator = pytest.mark.skip(reason="needs an accelerator: run with --accelerator")
    tests = pathlib.Path(__file__).parent
    for item in items:
        tier = item.path.relative_to(tests).parts[0]
        if tier in TIERS:
            item.add_marker(tier)
        if item.get_closest_marker("device") and not config.getoption("--accelerator"):
            item.add_marker(no_accelerator)


class Golden:
    """Compares text with the file of that name in tests/golden, or rewrites the file."""

    def __init__(self, update: bool) -> None:
        self._update = update

    def check(self, name: str, text: str) -> None:
        """Fails with a unified diff when `text` is not what tests/golden/<name>.txt holds."""
        path, text = GOLDEN / f"{name}.txt", text.rstrip("\n") + "\n"
        if self._update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            return
        hint = "If the new text is right, rewrite it with --update-golden and review the diff."
        if not path.exists():
            pytest.fail(f"tests/golden/{name}.txt does not exist. {hint}", pytrace=False)
        expected = path.read_text()
        if text != expected:
            lines = (expected.splitlines(), text.splitlines())
            diff = difflib.unified_diff(*lines, f"golden/{name}.txt", "now", lineterm="")
            pytest.fail("\n".join(["Text differs from the golden file.", *diff, hint]), False)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.config.getoption("--update-golden"))
