"""The committed coverage table is what the rules and the summary of a run say."""

import jax
import pytest

from tests.conformance import harnesses, summary, table

MADE_WITH = summary.load()["jax"]


@pytest.mark.skipif(jax.__version__ != MADE_WITH, reason=f"the table was made with JAX {MADE_WITH}")
def test_the_table_is_current() -> None:
    hint = "write it with python -m tests.conformance.table"
    assert table.PATH.read_text() == table.text(), hint


def test_every_primitive_of_jax_is_in_the_table() -> None:
    text = table.text()
    assert not [name for name in harnesses.primitives() if f"`{name}`" not in text]


def test_reasons_are_for_primitives_without_a_rule() -> None:
    have = [
        name for name in table.REASONS_BY_NAME
        if name in harnesses.primitives()
        and any(harnesses.primitives()[name][0] in found for found in table.TABLES)
    ]  # fmt: skip
    assert not have


def test_the_summary_is_of_a_run_without_failures() -> None:
    found = [(g, s, n) for g, counts in summary.load()["groups"].items() for s, n in counts.items()]
    assert not [row for row in found if row[1] not in ("right", "refused")]
