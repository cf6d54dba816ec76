"""What ends long work before its end, and how it is saved: the same for every search."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxnn.run import checkpoints
from jaxnn.run.checks import as_real
from jaxnn.run.fingerprint import check_same_run

__all__ = ["Limits", "Saved", "Saver", "SearchProgress", "as_limits", "as_target", "ask_to_stop"]

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
    """Where a run is saved, and the metadata that whoever goes on from it has to share.

    A history is saved in a file of its own, so that a history which cannot be saved never keeps
    the state, which is what a run goes on from, from being saved.

    Attributes:
        path: the file of the state.
        metadata: what has to be the same.
    """

    path: Path
    metadata: Mapping[str, Any]

    @property
    def history_path(self) -> Path:
        """The file of the history, beside that of the state."""
        return self.path.with_name(f"{self.path.stem}.history{self.path.suffix}")

    def begin(self, arrays: Mapping[str, np.ndarray], *, has_history: bool = False) -> Saved | None:
        """What was saved, if anything, by a run of the same settings.

        Args:
            arrays: the state before the first step, of the shapes that will be saved.
            has_history: whether there is a history too.

        Raises:
            OSError: if nothing can be saved here.
            ValueError: if what is there is of another run or damaged, or this run's settings or
                state are too large to be saved.
        """
        checkpoints.check_fits(arrays, self.metadata)
        checkpoints.check_writable(self.path)
        if has_history:
            checkpoints.check_writable(self.history_path)
        if not self.path.exists():
            return None
        saved = self._load(self.path)
        if has_history and self.history_path.exists():
            saved = saved._replace(history=self._load(self.history_path).arrays)
        return saved

    def save(
        self,
        arrays: Mapping[str, np.ndarray],
        facts: Mapping[str, Any],
        history: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Saves; a full disk is no reason to lose the run.

        The history goes first: if a kill comes between the two, it holds more steps than the state
        has made, which can be cut off, and not fewer, which nobody could give back.
        """
        if history is not None:
            self._save(self.history_path, history, facts)
        self._save(self.path, arrays, facts)

    def _load(self, path: Path) -> Saved:
        saved = Saved(*checkpoints.load(path), None)
        check_same_run(path, saved.facts, self.metadata)
        return saved

    def _save(self, path: Path, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        try:
            checkpoints.save(path, arrays, {**self.metadata, **facts})
        except (OSError, ValueError) as error:
            with suppress(ValueError):  # A standard error that is closed takes no warning.
                warnings.warn(f"checkpoint not saved: {error}", RuntimeWarning, stacklevel=4)


class Saved(NamedTuple):
    """What a checkpoint holds: the arrays of the state, facts, and the arrays of the history."""

    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]
    history: dict[str, np.ndarray] | None
