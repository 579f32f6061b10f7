"""What the fork server imports, before there are threads: nothing here may start JAX's backend."""

import orbax.checkpoint  # noqa: F401

import training.checkpoint  # noqa: F401
