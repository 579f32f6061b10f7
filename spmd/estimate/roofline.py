"""How long one device computes, by what keeps it longest: memory or matrix units."""

from spmd.chips import Chip
from spmd.estimate.fusion import Held
from spmd.estimate.matrix import arithmetic
from spmd.estimate.work import Line, contracts
from spmd.partition.plan import Compute


def compute_seconds(line: Line, kept: Held, chip: Chip) -> float:
    """Seconds of one run of a line: of its memory traffic or of its arithmetic, whichever is
    longer.

    Args:
      kept: what is fused takes no memory traffic of its own.
    """
    seconds = traffic(line, kept) / chip.hbm_bandwidth
    found = line.instruction
    if line.flops.total and contracts(found):
        seconds = max(seconds, arithmetic(found, line.flops.total, line.mesh, chip))
    return seconds


def traffic(line: Line, kept: Held) -> float:
    """Bytes that one run of a line reads from memory and writes to it.

    Operations that pick or place windows (no arithmetic, no elementwise form) touch the window
    alone, however large the array is that it lies in.
    """
    writes, reads = kept.writes[line.index], kept.reads[line.index]
    found = line.instruction
    if isinstance(found, Compute) and found.regions or not writes:
        return 0.0
    if isinstance(found, Compute) and not found.op.rule.flops and not found.op.rule.early:
        data = [kept.sizes.of(k, line.mesh) for k in (*found.operands, *found.results)
                if k.value.rank and k.value.dtype == found.results[0].value.dtype]  # fmt: skip
        return 2.0 * min(data, default=0)
    return float(sum(kept.sizes.of(key, line.mesh) for key in (*reads, *writes)))
