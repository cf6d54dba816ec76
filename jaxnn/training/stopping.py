"""What ends long work before its end, and how it is saved: the same for every search."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxnn.checks import as_real
from jaxnn.training import checkpoints
from jaxnn.training.identities import refuse_other

__all__ = ["Limits", "Saver", "SearchProgress", "as_limits", "as_target", "ask_to_stop"]

SECONDS_BETWEEN_SAVES = 30.0


class SearchProgress(NamedTuple):
    """Where a search stands, for a callback.

    Attributes:
        num_evaluations: losses evaluated so far.
        loss: lowest loss so far; inf if none was finite.
    """

    num_evaluations: int
    loss: float


class Limits(NamedTuple):
    """When a search ends, whatever it has found: asked between chunks.

    Attributes:
        max_seconds: seconds it may take.
        callback: called with a `SearchProgress`; raises `StopIteration` to end the search.
    """

    max_seconds: float | None = None
    callback: Callable[[SearchProgress], None] | None = None


def as_limits(
    max_seconds: float | None, callback: Callable[[SearchProgress], None] | None
) -> Limits:
    """The limits, checked."""
    if max_seconds is not None:
        max_seconds = float(as_real("max_seconds", max_seconds))
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable; got a {type(callback).__name__}")
    return Limits(max_seconds, callback)


def as_target(target_loss: float | None, dtype: Any) -> float | None:
    """A target, as a number that losses of this dtype can take."""
    if target_loss is None:
        return None
    as_real("target_loss", target_loss, minimum=-np.inf)
    return float(np.asarray(target_loss, dtype))


def ask_to_stop(limits: Limits, started: float, progress: SearchProgress) -> bool:
    """Whether time is up, or the callback says so; `started` is of `time.monotonic`."""
    is_over = limits.max_seconds is not None and time.monotonic() - started >= limits.max_seconds
    if limits.callback is not None:
        try:
            limits.callback(progress)
        except StopIteration:
            return True
    return is_over


class Saver(NamedTuple):
    """Where a search is saved, and the facts that whoever goes on from it has to share."""

    path: Path
    facts: Mapping[str, Any]

    def save(self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        """Saves; a full disk, or a history too long to save, is no reason to lose the run."""
        try:
            checkpoints.save(self.path, arrays, {**self.facts, **facts})
        except (OSError, ValueError) as error:
            warnings.warn(f"checkpoint not saved: {error}", RuntimeWarning, stacklevel=3)

    def load(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """What was saved, if anything, by a run of the same settings."""
        checkpoints.check_writable(self.path)
        if not self.path.exists():
            return None
        arrays, facts = checkpoints.load(self.path)
        refuse_other(self.path, facts, self.facts)
        return arrays, facts
