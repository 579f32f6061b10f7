"""Checkpoints of a run: written in the background, verified when read, read onto any mesh."""

from training.checkpoint.checkpoints import Checkpoints
from training.checkpoint.identity import identity

__all__ = ["Checkpoints", "identity"]
