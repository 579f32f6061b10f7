"""Rows of the matrix about what is around a run of train.py, each in real processes."""

import pytest

from tests.faults import surroundings
from tests.faults.runs import Skip


@pytest.mark.multihost
@pytest.mark.parametrize(
    "case",
    [
        surroundings.slow_disk, surroundings.nan_batch, surroundings.clock_jumps,
        surroundings.small_files,
    ],
)  # fmt: skip
def test_the_outcome_is_as_the_matrix_says(case, tmp_path):
    try:
        assert case(tmp_path) == []
    except Skip as reason:
        pytest.skip(str(reason))
