"""A few of the cases of `python -m tests.fuzz`, and that it would find what it looks for."""

import time

import pytest

from sharding.errors import ArgumentError, Problem
from tests.fuzz import configurations, reports, watch


@pytest.mark.parametrize(
    ("kind", "count"), [(configurations, 300), (reports, 100)], ids=["configurations", "reports"]
)
def test_random_cases_raise_our_own_errors_only(kind, count, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    configurations.prepare(folder)
    monkeypatch.chdir(folder)
    results = {seed: watch.attempt(lambda s=seed: kind.run(s, folder)) for seed in range(count)}
    bad = {seed: result for seed, result in results.items() if result.bad}
    assert not bad, "\n".join(f"{seed}: {r.kind}\n{r.detail}" for seed, r in bad.items())
    kinds = {result.kind for result in results.values()}
    assert "accepted" in kinds and len(kinds) > 1, "all alike: the cases are not varied"


def test_a_case_is_a_function_of_its_number(tmp_path):
    first = [configurations.generate(seed, tmp_path) for seed in range(20)]
    assert first == [configurations.generate(seed, tmp_path) for seed in range(20)]
    assert len({tuple(words) for words in first}) > 10
    assert reports.mutate(3) == reports.mutate(3) != reports.mutate(4)


def test_crashes_hangs_and_messages_that_cannot_be_shown_are_found(monkeypatch):
    def ours(what):
        raise ArgumentError(Problem(what, "why", "fix"))

    monkeypatch.setattr(watch, "LIMIT", 0.05)
    assert watch.attempt(lambda: 1 / 0).kind == "crash"
    assert watch.attempt(lambda: exit(3)).kind == "crash"
    assert watch.attempt(lambda: time.sleep(5)).kind == "hang"
    assert watch.attempt(lambda: ours("x")).kind == "ArgumentError"
    assert watch.attempt(lambda: ours("\udcff")).kind == "crash"
    assert watch.attempt(lambda: ours("a\n" * 9)).kind == "crash"
