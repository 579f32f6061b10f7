"""Models without annotations inside send what theory says of how their arguments lie, no more."""

import jax
import pytest

from benchmarks.suite.case import RUNS, Case
from benchmarks.suite.planned import planned
from benchmarks.suite.unannotated import PROGRAMS

BY_NAME = {program.name: program for program in PROGRAMS}


def parameter_bytes(case: Case) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(case.args[0]))


@pytest.mark.parametrize(
    "name, times",
    [
        ("gpt_fsdp", 2), ("vit_fsdp", 2), ("translator_fsdp", 2), ("mixer_fsdp", 2),
        ("gpt_zero1", 2), ("vit_zero1", 2), ("gpt_remat_fsdp", 3), ("gpt_scanned_fsdp", 3),
    ],
)  # fmt: skip
def test_sharded_parameters_are_gathered_and_their_gradients_scattered(
    name: str, times: int
) -> None:
    """Rajbhandari et al. (arXiv 1910.02054), section 7: each parameter is gathered once, with
    recomputation twice, and its gradient reduced to one shard. Activations stay where they are: 5 %
    is for vectors, which are whole, and for what is smaller than the weights that it meets."""
    case = BY_NAME[name].make(RUNS)
    shards = case.mesh["data"]
    sent = times * parameter_bytes(case) * (shards - 1) / shards
    assert 0.7 * sent < planned(case).wire_bytes < 1.05 * sent


@pytest.mark.parametrize("name", ["gpt", "translator"])
def test_columns_and_rows_reduce_what_megatron_does(name: str) -> None:
    """With parameters over `data` as well, less of them is sent than all of them twice, and of
    activations what a tensor-parallel model sends."""
    plain, both = (BY_NAME[f"{name}_{way}"].make(RUNS) for way in ("columns", "columns_fsdp"))
    assert planned(both).wire_bytes < planned(plain).wire_bytes
