"""What a training state belongs to: configuration and data that its continuation must share."""

from __future__ import annotations

import dataclasses
from typing import Any

from sharding.errors import Problem
from training.config import RunConfig
from training.data import Corpus

__all__ = ["differences", "identity"]

# These change how the model is computed, not what its state means.
_FREE_MODEL_KEYS = ("dtype", "remat", "dropout")


def identity(run: RunConfig, corpus: Corpus) -> dict[str, Any]:
    """What must be the same for a state to be continued, by option name."""
    model = dataclasses.asdict(run.model)
    for key in _FREE_MODEL_KEYS:
        del model[key]
    return {
        **model,
        "seed": run.train.seed,
        "batch": run.train.batch,
        "sequence": run.data.sequence,
        "validation": run.data.validation,
        "text": corpus.fingerprint,
    }


def differences(shown: str, found: dict[str, Any], expected: dict[str, Any]) -> list[Problem]:
    """One problem for each entry of `expected` that `found` has not.

    Args:
      shown: the checkpoint that `found` is the record of, for messages.
    """
    return [
        Problem(
            f"{shown}: {key} is {found.get(key)}",
            f"this run has {expected[key]}, so the state would not mean the same",
            "name the data that the run began with, or give --allow-data-change"
            if key == "text"
            else "give this run the same value, or another --checkpoint-dir",
        )
        for key in expected
        if found.get(key) != expected[key]
    ]
