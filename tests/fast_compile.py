"""XLA's compiler on CPUs at its fastest: results are what tests compare, not how fast they come.

Tests spend most of their time in LLVM. With these options a program keeps its collectives and
operations, and fewer of them are fused, without effort for speed; tests take half the time.
`XLA_FLAGS=--xla_backend_optimization_level=3` tests with the compiler as users have it.
"""

import os
import subprocess
import sys

OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
_CHECK_S = 120


def use() -> None:
    """Puts the options into `XLA_FLAGS`, which child processes inherit, before JAX starts.

    Does nothing where the user has set one of them, or the installed XLA does not know one: XLA
    aborts on flags that it does not know, so another process tries them.
    """
    given = os.environ.get("XLA_FLAGS", "")
    if any(name in given for name in OPTIONS):
        return
    wanted = [f"--{name}={str(value).lower()}" for name, value in OPTIONS.items()]
    flags = " ".join([given, *wanted]).strip()
    start = [sys.executable, "-c", "import jax; jax.devices('cpu')"]
    environ = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(start, env=environ, capture_output=True, timeout=_CHECK_S)
    if done.returncode == 0:
        os.environ["XLA_FLAGS"] = flags
