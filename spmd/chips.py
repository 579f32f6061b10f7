"""Accelerators as numbers: what a chip computes, what its memory holds, how fast its links are.

All numbers are of one JAX *device*. A TPU v2, v3 or 7x chip is two devices, one for each core; a
v4 or v5p chip, whose two cores work as one ("megacore"), is one. Bandwidth of links is one way.

Sources, by the names used below:
  cloud   cloud.google.com/tpu/docs, the page of each version: peak, memory
  book    jax-ml.github.io/scaling-book, "How to Think About TPUs" and "How to Think About GPUs":
          memory bandwidth, ICI links, wrap-around, DCN per host, about 1 us per hop
  cacm    Jouppi et al., "A domain-specific supercomputer for training deep neural networks",
          CACM 63(7), 2020, table 3: TPU v2 and v3 links of 496 and 656 Gbit/s each way
  nvidia  the data sheets of A100, H100, H200 (SXM), B200 (HGX) and L4, dense: peak, memory,
          NVLink; PCIe for the L4, which has none
  dgx     the DGX A100 and H100 reference architectures: one InfiniBand port for each GPU
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from sharding.errors import ArgumentError, Problem

__all__ = ["ALIASES", "CHIPS", "EXCHANGES_AHEAD", "Chip", "of_kind"]

GiB = 2**30


@dataclass(frozen=True)
class Chip:
    """One kind of accelerator, in numbers of one device.

    Attributes:
      name: as in `Machine.parse`, e.g. "v5p".
      family: "tpu", "gpu" or "cpu".
      kind: `device_kind` of the JAX device.
      rank: dims of the torus; 0 where a switch connects the devices of a node.
      cores: devices per chip; they share the chip's links.
      flops: (dtype, dense matmul FLOP/s), each dtype that the hardware multiplies.
      hbm_bytes: memory.
      usable_bytes: of it, what a program may use.
      hbm_bandwidth: bytes/s.
      link_bandwidth: bytes/s one way over one link of the chip (torus), or from one device into
        the switch.
      network_bandwidth: bytes/s one way and device between slices (DCN) or nodes (InfiniBand).
      hop_latency, network_latency: seconds.
      vmem_bytes: of the core's own memory, what XLA keeps temporaries in.
      clock: cycles/s; 0.0 where no compiler reports cycles.
      tile: rows and columns of a matrix unit; 0 where any size is as good.
      results: elements/s that leave the matrix units; 0.0 where they keep up with any product.
      wrap: "full" wraps a dim of `pod` chips, "cubes" all dims if all are multiples of 4.
      pod: chips along a dim that is wrapped around, for `wrap="full"`.
      node: devices in a node, for GPUs.
      overlaps: kinds of collectives that XLA runs beside computation, with `options`, in a
        program with explicit collectives; all others hold the device up.
      unasked: of `overlaps`, the kinds for which XLA needs no `options`, where there are some.
      offloaded: of `overlaps`, the kinds that SparseCores run, in the device's memory.
      options: (name, value) of XLA's options that such programs are compiled with.
      scatters: whether XLA keeps a reduce-scatter among all devices, and makes no all-reduce of it;
        SparseCores do, with `options`.
    """

    name: str
    family: str
    kind: str
    rank: int
    cores: int
    flops: tuple[tuple[str, float], ...]
    hbm_bytes: float
    usable_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    hop_latency: float = 1e-6
    network_latency: float = 1e-5
    vmem_bytes: float = 0.0
    clock: float = 0.0
    tile: int = 0
    results: float = 0.0
    wrap: str = ""
    pod: int = 0
    node: int = 0
    overlaps: frozenset[str] = frozenset()
    unasked: frozenset[str] = frozenset()
    offloaded: frozenset[str] = frozenset()
    options: tuple[tuple[str, str], ...] = ()
    scatters: bool = False

    @property
    def gathers_alone(self) -> bool:
        """Whether gathers run beside computation, and sums do not: those of streams are scattered
        and gathered, see `scattered`."""
        return "all_gather" in self.overlaps and "all_reduce" not in self.overlaps

    def as_it_is(self) -> Chip:
        """The chip for a compiler that is not told `options`."""
        if not self.options:
            return self
        scatters = self.scatters and not self.offloaded
        return replace(self, overlaps=self.unasked, offloaded=frozenset(), options=(),
                       scatters=scatters)  # fmt: skip

    def ring_seconds(self, size: float) -> float:
        """Seconds in which a device sends `size` bytes in a ring, in both directions."""
        return size / (2 * self.link_bandwidth)

    def peak(self, dtype: str) -> float:
        """FLOP/s of matmuls in `dtype`, e.g. "bfloat16".

        Raises:
          ArgumentError: the chip's rate for this dtype is not known.
        """
        known = dict(self.flops)
        if dtype not in known:
            raise ArgumentError(
                Problem(
                    f"peak of {self.name} in {dtype}",
                    f"rates are known for {', '.join(known)}",
                    f"count in {self.flops[0][0]}, or add the rate to CHIPS in spmd/chips.py",
                )
            )
        return known[dtype]


# Of buffer assignments, libtpu 0.0.42, in MiB: 112, 48 and 90 are used at most. Of 128, 64 and 128
# (book) the rest is left to kernels. On chips before these XLA puts no values there.
_VMEM = {"v5e": 112, "v5p": 48, "v6e": 96}
# Of compiled programs, libtpu 0.0.42: all TPUs start permutes ahead, v5e gathers too. Where they
# are asked to, all start gathers and exchanges; SparseCores run gathers and reductions.
_PERMUTES = frozenset(("permute",))
_GATHERS = frozenset(("permute", "all_gather"))
_EXCHANGES = frozenset(("permute", "all_gather", "all_to_all"))
_OFFLOADED = frozenset(("all_gather", "all_reduce", "reduce_scatter"))
EXCHANGES_AHEAD = "xla_tpu_enable_async_all_to_all"
# Collectives among the devices of one axis of the torus, and of two or three.
_OFFLOAD = (
    *(f"xla_tpu_enable_sparse_core_collective_offload_{what}" for what in (
        *sorted(_OFFLOADED), "2d_all_gather", "3d_all_gather", "nd_reduce_scatter"
    )),
    "xla_tpu_enable_sparse_core_offload_queuing_in_lhs",  # the scheduler knows they take turns
)  # fmt: skip


# Of one core and cycle, for products of a short inner dim, in what libtpu 0.0.42 schedules; of both
# cores of v4 and v5p.
_RESULTS = {"v2": 72, "v3": 72, "v4": 144, "v5e": 72, "v5p": 185, "v6e": 135}


class _Ahead(NamedTuple):
    """What XLA for a TPU runs beside computation; the attributes as those of `Chip`, and `options`
    as names of what is switched on."""

    options: tuple[str, ...]
    unasked: frozenset[str] = _PERMUTES
    offloaded: frozenset[str] = frozenset()
    scatters: bool = False


_BEFORE = _Ahead(("xla_enable_async_all_gather", EXCHANGES_AHEAD))
_SPARSE = _Ahead((*_OFFLOAD, EXCHANGES_AHEAD), _PERMUTES, _OFFLOADED, True)
_BESIDE = {
    "v2": _BEFORE._replace(scatters=True), "v3": _BEFORE._replace(scatters=True), "v4": _BEFORE,
    "v5e": _Ahead((EXCHANGES_AHEAD,), _GATHERS), "v5p": _SPARSE, "v6e": _SPARSE,
}  # fmt: skip
# NCCL runs on streams of its own.
_GPU = frozenset(("permute", "all_gather", "all_reduce", "reduce_scatter", "all_to_all"))


def _tpu(
    name: str, kind: str, rank: int, bf16: float, int8: float, hbm: int, usable: float,
    hbm_bandwidth: float, link: float, clock: float, wrap: str, pod: int, host: int,
    cores: int = 1,
) -> Chip:  # fmt: skip
    """A TPU; `hbm` and `usable` in GiB, `host` in chips."""
    # By default XLA multiplies float32 in one bfloat16 pass; exactly (Precision.HIGHEST) in 6.
    rates = (("bfloat16", bf16), ("int8", int8), ("float32", bf16 / 6))
    # DCN: 2.5e10 bytes/s per host (book), which the devices of the host share.
    dcn, ahead = 2.5e10 / (host * cores), _BESIDE[name]
    return Chip(name, "tpu", kind, rank, cores, rates, hbm * GiB, usable * GiB, hbm_bandwidth,
                link, dcn, vmem_bytes=_VMEM.get(name, 0) * 2**20, clock=clock, wrap=wrap, pod=pod,
                tile=256 if name == "v6e" else 128, results=_RESULTS[name] * clock,
                overlaps=_EXCHANGES | ahead.offloaded, unasked=ahead.unasked,
                offloaded=ahead.offloaded, options=tuple((x, "true") for x in ahead.options),
                scatters=ahead.scatters)  # fmt: skip


def _gpu(name: str, bf16: float, tf32: float, hbm: float, bandwidth: float, links: float,
         network: float) -> Chip:  # fmt: skip
    rates = [("bfloat16", bf16), ("float16", bf16), ("int8", 2 * bf16), ("float32", tf32)]
    if name != "a100":
        rates.append(("float8", 2 * bf16))
    # JAX preallocates 75 % of the memory by default; a program may be given up to about 95 %.
    return Chip(name, "gpu", f"NVIDIA {name.upper()}", 0, 1, tuple(rates), hbm, 0.95 * hbm,
                bandwidth, links, network, network_latency=5e-6, node=8, overlaps=_GPU)  # fmt: skip


# Per device: peak and memory (cloud), memory that libtpu 0.0.42 leaves to a program (as its error
# RESOURCE_EXHAUSTED says), memory bandwidth (book), links (book; v2 and v3: cacm).
# The clock is peak / (2 x MXU cells): 1, 2, 8, 4 and 8 MXUs of 128x128 for v2, v3, v4, v5e and
# v5p, 4 of 256x256 for v6e. For one 8192^3 matmul libtpu estimates 1.00, 1.03, 1.08, 1.14, 1.11
# and 1.42 times the cycles that these clocks have at peak.
_CHIPS = (
    _tpu("v2", "TPU v2", 2, 22.5e12, 22.5e12, 8, 7.48, 350e9, 62e9, 0.69e9, "full", 16, 4, 2),
    _tpu("v3", "TPU v3", 2, 61.5e12, 61.5e12, 16, 15.48, 450e9, 82e9, 0.94e9, "full", 32, 4, 2),
    _tpu("v4", "TPU v4", 3, 275e12, 275e12, 32, 30.75, 1.2e12, 4.5e10, 1.05e9, "cubes", 0, 4),
    _tpu("v5e", "TPU v5 lite", 2, 197e12, 394e12, 16, 15.75, 8.1e11, 5e10, 1.5e9, "full", 16, 8),
    _tpu("v5p", "TPU v5", 3, 459e12, 918e12, 96, 95.74, 2.8e12, 1e11, 1.75e9, "cubes", 0, 4),
    _tpu("v6e", "TPU v6 lite", 2, 918e12, 1836e12, 32, 31.25, 1.6e12, 1e11, 1.75e9, "full", 16, 8),
    _gpu("l4", 121e12, 60e12, 24e9, 3e11, 32e9, 12.5e9),
    _gpu("a100", 312e12, 156e12, 80e9, 2.04e12, 300e9, 25e9),
    _gpu("h100", 989e12, 494e12, 80e9, 3.35e12, 450e9, 50e9),
    _gpu("h200", 989e12, 494e12, 141e9, 4.8e12, 450e9, 50e9),
    _gpu("b200", 2250e12, 1125e12, 180e9, 7.7e12, 900e9, 50e9),
    # Simulated devices. Nominal: times in these units order plans, and predict nothing.
    Chip("cpu", "cpu", "cpu", 0, 1, (("float32", 1e11), ("bfloat16", 1e11), ("int8", 1e11)),
         4e9, 4e9, 2e10, 1e10, 1e9),
)  # fmt: skip

CHIPS: dict[str, Chip] = {chip.name: chip for chip in _CHIPS}


def of_kind(device_kind: str) -> Chip | None:
    """The chip of a JAX device, by its `device_kind`; None for chips that nobody described."""
    return next((c for c in CHIPS.values() if _short(device_kind).startswith(_short(c.kind))), None)


def _short(kind: str) -> str:
    # "TPU v5 lite" and "TPU v5e" are one chip, "TPU v5" and "TPU v5p" another
    return kind.lower().replace(" lite", "e")


# Names that people use for the same chip, for suggestions.
ALIASES = {
    "v5litepod": "v5e", "v5lite": "v5e", "v4p": "v4", "v6": "v6e", "v5": "v5p", "trillium": "v6e",
    "tpuv3": "v3", "tpuv4": "v4", "tpuv5e": "v5e", "tpuv5p": "v5p", "tpuv6e": "v6e",
}  # fmt: skip
