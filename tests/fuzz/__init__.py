"""Random configurations and mutated report files: only our own errors, and nothing hangs."""
