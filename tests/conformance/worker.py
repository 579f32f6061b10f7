"""A process that runs batches of cases; it may die or hang, which its parent takes as a result.

Reads one JSON object per line: harness, mesh, first, alone. Answers with lines of their own:
{"start": index, "case": its text}, {"records": [...]}, and {"done": seconds} at the end of a batch.
"""

import json
import os
import resource
import sys
import time
from typing import Any

MEMORY = 3 << 30  # bytes, after which compiled programs are forgotten
DEVICES = 8


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    os.environ["SPMD_VERIFY"] = "1"
    os.environ["JAX_PLATFORMS"] = "cpu"  # whatever the parent has
    # Threads of LAPACK on every device at once wait for each other by spinning: 100 times slower.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    from spmd.simulate import simulate

    simulate(DEVICES)
    import jax

    from tests.conformance import harnesses
    from tests.conformance.cases import parse_mesh
    from tests.conformance.run import Subject, batches, fast_compile

    def say(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")

    options = {} if "--default-compiler" in sys.argv else fast_compile()
    subject: Subject | None = None
    say(ready=True)
    for line in sys.stdin:
        task, start = json.loads(line), time.perf_counter()
        if subject is None or subject.harness.name != task["harness"]:
            if _resident() > MEMORY:
                jax.clear_caches()
            subject = Subject(harnesses.by_name()[task["harness"]], options)
        work = batches(
            subject, parse_mesh(task["mesh"]), task["first"], task["alone"],
            lambda i, case: say(start=i, case=case),
        )  # fmt: skip
        for records in work:
            say(records=records)
        say(done=time.perf_counter() - start)


def _resident() -> int:
    """Bytes of memory in use now."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main()
