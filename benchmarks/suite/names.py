"""Names of the systems that are compared, and of their phases; imports nothing."""

OURS, SHARDY, GSPMD, BY_HAND = SYSTEMS = ("spmd.jit", "Shardy", "GSPMD", "by hand")
PLANNING = ("propagate", "partition")  # phases of ours that jax.jit leaves to XLA
