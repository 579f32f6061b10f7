"""What data movement and redundant work cost, in bytes on a link.

One unit keeps plans comparable: a byte sent over a link. Computation and memory traffic enter by
the ratio of a TPU v5p (2.8 TB/s HBM, 180 GB/s per axis both ways; the JAX scaling book,
"TPU specs"). Collectives follow the ring model of Thakur et al. (2005).
"""

LINK_BYTES_PER_S = 1.8e11
# Far below the chip's own ratio (2,550): a matmul that every device repeats in order to save a
# collective is paid at every size of mesh, the collective only once.
FLOPS_PER_LINK_BYTE = 8.0
HBM_BYTES_PER_LINK_BYTE = 2.8e12 / LINK_BYTES_PER_S

# Enough to prefer one collective over two of the same bytes, too little to prefer more bytes.
STEP_BYTES = 64.0


def all_gather(out_bytes: float, shards: int) -> float:
    """Wire bytes per device: every device receives all shards but its own."""
    return out_bytes * (shards - 1) / shards


def reduce_scatter(in_bytes: float, shards: int) -> float:
    return in_bytes * (shards - 1) / shards


def all_reduce(size: float, shards: int) -> float:
    """A reduce-scatter and an all-gather."""
    return 2 * size * (shards - 1) / shards


def all_to_all(size: float, shards: int) -> float:
    return size * (shards - 1) / shards


def compute(flops: float, hbm_bytes: float) -> float:
    """Local work, in link bytes."""
    return flops / FLOPS_PER_LINK_BYTE + hbm_bytes / HBM_BYTES_PER_LINK_BYTE
