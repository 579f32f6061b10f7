"""Models at the sizes at which they are trained and served, on 16 or 32 devices of a pod.

    python -m benchmarks.suite --target cpu:32 --programs benchmarks.suite.pods --system spmd.jit

Llama with 8 billion parameters, mixtures of experts, diffusion, graphs, recommendation, serving:
written as popular codebases for JAX write them, and sharded as they shard them. Sizes and meshes
are those of the programs, whatever size the suite asks for. Nothing here is for a run on simulated
devices: programs are planned and compiled.
"""

from benchmarks.suite.pods import (
    language,
    mixtures,
    recommend,
    science,
    sequence,
    serving,
    state_spaces,
    training,
    unet,
    vision,
)

PROGRAMS = (
    *language.PROGRAMS,
    *training.PROGRAMS,
    *mixtures.PROGRAMS,
    *sequence.PROGRAMS,
    *state_spaces.PROGRAMS,
    *vision.PROGRAMS,
    *unet.PROGRAMS,
    *science.PROGRAMS,
    *recommend.PROGRAMS,
    *serving.PROGRAMS,
)
