"""The dense models of the GSPMD paper, partitioned by `spmd.jit` and compiled for TPU v3.

    python -m benchmarks.paper                     # all that are not in the results file yet
    python -m benchmarks.paper --only 64B-128,1T-2048 --out results.json
    python -m benchmarks.paper --remat dots        # keep the results of matmuls: more memory
    python -m benchmarks.paper --table             # print the results file

No TPU is needed: libtpu compiles for described ones (`spmd.aot`). Each model runs in a process of
its own, one after the other, and its result is written when it is there, so that a run that was
stopped goes on where it was. Takes minutes per model and several GB of memory.

The paper (arXiv 2105.04663) reports 50 % to 62 % of the peak, measured, on 128 to 2,048 cores (its
abstract). What is compiled here, and where it is from:
- sizes, meshes, sequence length, vocabulary and optimiser: the authors' own programs, tensorflow/
  lingvo, lingvo/tasks/lm/params/synthetic_packed_input.py: DenseLm128B8x8, 128B16x16 and 128B32x32
  (64 layers, model 8,192, hidden 65,536 gated, 128 heads of 128, meshes 8x16, 16x32, 32x64, 1,024
  positions, 32,000 words, bfloat16 activations, Adafactor without momentum) and DenseLm1T16x16
  (128 layers, model 16,384, hidden 131,072, 256 heads). 64B, 256B and 512B are the 128B model
  with half, two and four times the layers.
- batch: 512 sequences for 128B on 2,048 cores is lingvo's. The others are scaled from it so that
  all cores do the same work per step, which for 1T rounds to 128 (twice the work).
- the model is models/transformer.py, each layer rematerialised: in full, or with `--remat dots` all
  but the matmuls (the paper does not say how much it kept). It has rotary positions where lingvo
  adds a learned bias by distance.
- sharding: table "2d" of models/shardings.py, the paper's finalised form.

Utilisation is model FLOPs (6 per weight and token, attention, no recomputation) over the peak of
61.5 TFLOP/s per core and the predicted time; `spmd/ahead/schedule.py` says how that is predicted.
With full rematerialisation a quarter of all FLOPs are done again, so that 75 % is the ceiling.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

RESULTS = Path("paper_results.json")


@dataclasses.dataclass(frozen=True)
class Case:
    """One column of the paper's table of wide dense models."""

    layers: int
    model: int
    hidden: int
    heads: int
    batch: int
    topology: str
    mesh: tuple[int, int]  # (data, tensor): X and Y of the paper
    sequence: int = 1024
    vocab: int = 32_000
    remat: str = "full"


def _wide(layers: int, batch: int, side: int, mesh: tuple[int, int]) -> Case:
    return Case(layers, 8192, 65536, 128, batch, f"v3:{side}x{side}", mesh)


CASES = {
    "64B-128": _wide(32, 64, 8, (8, 16)),
    "64B-512": _wide(32, 256, 16, (16, 32)),
    "64B-2048": _wide(32, 1024, 32, (32, 64)),
    "128B-2048": _wide(64, 512, 32, (32, 64)),
    "256B-2048": _wide(128, 256, 32, (32, 64)),
    "512B-2048": _wide(256, 128, 32, (32, 64)),
    "1T-2048": Case(128, 16384, 131072, 256, 128, "v3:32x32", (32, 64)),
}


def config(case: Case) -> Any:
    """The `TransformerConfig` of a case."""
    from models.transformer import TransformerConfig

    return TransformerConfig(
        vocab_size=case.vocab, num_layers=case.layers, embed_dim=case.model, mlp_dim=case.hidden,
        num_heads=case.heads, num_kv_heads=case.heads, head_dim=128, dtype="bfloat16",
        remat=case.remat,
    )  # fmt: skip


def optimizer() -> Any:
    import optax

    return optax.adafactor(1e-3, decay_rate=0.8, clipping_threshold=1.0, momentum=None)


def train_step(model: Any, params: Any, opt_state: Any, batch_BS: Any) -> tuple[Any, Any, Any]:
    """One update; `batch_BS` is [batch, sequence + 1] token ids."""
    import flax.linen as nn
    import jax
    import optax

    from models.loss import cross_entropy
    from models.transformer import Transformer
    from sharding import shard

    batch_BS = shard(batch_BS, "batch", None)

    def loss_of(params: Any) -> Any:
        logits_BSV, _ = Transformer(model).apply({"params": params}, batch_BS[:, :-1])
        return cross_entropy(logits_BSV, batch_BS[:, 1:])

    loss, grads = jax.value_and_grad(loss_of)(params)
    # The statistics of a factored parameter have fewer dims than the names in its box.
    plain, grads = nn.unbox(params), nn.unbox(grads)
    updates, opt_state = optimizer().update(grads, opt_state, plain)
    plain = optax.apply_updates(plain, updates)
    return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(plain)), opt_state, loss


def abstract_arguments(case: Case) -> tuple[Any, Any, Any]:
    """Parameters, optimiser state and batch, as shapes."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from models.transformer import Transformer

    def init() -> Any:
        tokens_BS = jnp.zeros((1, 8), jnp.int32)
        return Transformer(config(case)).init(jax.random.key(0), tokens_BS)["params"]

    params = jax.eval_shape(init)
    opt_state = jax.eval_shape(optimizer().init, nn.unbox(params))
    batch = jax.ShapeDtypeStruct((case.batch, case.sequence + 1), jnp.int32)
    return params, opt_state, batch


def parameters(case: Case) -> int:
    layer = 3 * case.model * case.hidden + 4 * case.model * case.heads * 128
    return case.layers * layer + case.vocab * case.model


def run(case: Case) -> dict[str, Any]:
    """Partitions and compiles one case; plain values."""
    import spmd
    from models.shardings import rules_for
    from spmd.ahead.compile import aot_partitioned
    from spmd.ahead.libtpu import described_mesh
    from spmd.hardware import Machine
    from training.throughput import flops_per_token

    started = time.perf_counter()
    sizes = dict(zip(("data", "tensor"), case.mesh, strict=True))
    mesh, layout = described_mesh(Machine.parse(case.topology), sizes)
    arguments, step = abstract_arguments(case), partial(train_step, config(case))
    options = {"mesh": mesh, "axis_rules": rules_for("2d", sizes)}
    inferred = spmd.jit(step, **options).trace(*arguments).propagate().in_shardings
    jitted = spmd.jit(
        step, in_shardings=inferred, out_shardings=(*inferred[:2], None), donate_argnums=(0, 1),
        **options,
    )  # fmt: skip
    partitioned = jitted.trace(*arguments).propagate().partition()
    planned = time.perf_counter() - started
    flops = flops_per_token(config(case), case.sequence) * case.batch * case.sequence
    found = aot_partitioned(partitioned, layout, model_flops=flops)
    print(found, flush=True)
    return {
        **found.to_json(), "parameters": parameters(case), "case": dataclasses.asdict(case),
        "plan_seconds": planned, "total_seconds": time.perf_counter() - started,
        "predicted_by_us": {"peak_memory": partitioned.peak_memory,
                            "wire_bytes": partitioned.wire_bytes},
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """A line for each case that has a result; the paper's column is its abstract."""
    head = ("model", "parameters", "cores", "mesh", "batch", "remat", "memory", "step", "compute",
            "exposed", "utilisation", "paper")  # fmt: skip
    rows: list[tuple[str, ...]] = [head]
    for name, found in results.items():
        case = found["case"]
        memory = f"{found['needed_bytes'] / 2**30:.1f} of {found['available_bytes'] / 2**30:.1f}"
        memory += " GiB" + ("" if found["fits"] else ", does not fit")
        times = ["-"] * 4
        if found["fits"]:
            schedule = found["schedule"]
            times = [
                f"{found['step_seconds']:.2f} s", f"{schedule['compute']:.2f} s",
                f"{schedule['exposed']:.2f} s", f"{found['utilisation']:.1%}",
            ]  # fmt: skip
        rows.append((
            name.split("-")[0], f"{found['parameters'] / 1e9:.1f}B", f"{found['devices']:,}",
            "x".join(map(str, case["mesh"])), str(case["batch"]), case["remat"], memory, *times,
            "50-62%",
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--only", default="", help=f"names with commas, of {', '.join(CASES)}")
    parser.add_argument("--remat", default="full", choices=("full", "dots"), help="see above")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON, read to go on")
    parser.add_argument("--table", action="store_true", help="compile nothing")
    parser.add_argument("--again", action="store_true", help="also what has a result")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.one:
        case = dataclasses.replace(CASES[given.one], remat=given.remat)
        given.out.write_text(json.dumps(run(case), indent=1))
        return 0
    names = [n for n in given.only.split(",") if n] or list(CASES)
    if unknown := [n for n in names if n not in CASES]:
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    results = json.loads(given.out.read_text()) if given.out.exists() else {}
    wanted = {_key(n, given.remat): n for n in names}
    if not given.table:
        missing = {k: n for k, n in wanted.items() if given.again or k not in results}
        _run_all(missing, given.remat, results, given.out)
    ordered = (_key(n, remat) for n in CASES for remat in ("full", "dots"))
    print(table({key: results[key] for key in ordered if key in results}))
    return 0 if given.table or all(key in results for key in wanted) else 1


def _key(name: str, remat: str) -> str:
    return name if remat == "full" else f"{name} {remat}"


def _run_all(missing: dict[str, str], remat: str, results: dict[str, Any], out: Path) -> None:
    for key, name in missing.items():
        print(f"{key} ...", flush=True)
        part = out.with_suffix(f".{name}.part")
        command = [sys.executable, "-m", "benchmarks.paper", "--one", name, "--remat", remat]
        done = subprocess.run([*command, "--out", str(part)], check=False)
        if done.returncode or not part.exists():
            print(f"{key} ended with exit code {done.returncode}", file=sys.stderr)
            continue
        results[key] = json.loads(part.read_text())
        part.unlink()
        out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
