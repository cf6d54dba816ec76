"""The host's walk over the epochs of a gradient descent: chunks, limits and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxnn.training.descending import RUNNING, Records, State
from jaxnn.training.naming import numbered_leaves, with_leaves
from jaxnn.training.pacing import chunks
from jaxnn.training.stopping import (
    SECONDS_BETWEEN_SAVES,
    Limits,
    Saver,
    SearchProgress,
    ask_to_stop,
)

__all__ = ["Walked", "walk"]

RECORDS_PER_CHUNK = 2**17


class Walked(NamedTuple):
    """How far a descent came.

    Attributes:
        state: where it stands.
        losses: before every step, `(steps,)`.
        validation: after every epoch on the validation batch, `(epochs,)`; empty without one.
        num_epochs: epochs begun.
        stopped: whether a limit ended it.
    """

    state: State
    losses: np.ndarray
    validation: np.ndarray
    num_epochs: int
    stopped: bool


def walk(
    descend: Callable[..., tuple[State, Records]],
    state: State,
    num_epochs: int,
    steps_per_epoch: int,
    work_per_epoch: float,
    limits: Limits,
    saver: Saver | None,
    progress: bool,
) -> Walked:
    """Descends chunk after chunk, from the start or from the checkpoint.

    Args:
        descend: `descend(state, first_epoch, num_epochs, capacity=...)` -> state and records.
        state: before the first step.
        num_epochs: epochs in all.
        steps_per_epoch: steps of each.
        work_per_epoch: evaluations of each, for the callback.
        limits: when to end.
        saver: where to save.
        progress: whether to show a progress bar.

    Returns:
        A `Walked`.
    """
    nothing = np.zeros(0, state.loss.dtype)
    walked = _resumed(saver, Walked(state, nothing, nothing, 0, stopped=False))
    if walked.num_epochs > num_epochs:
        raise ValueError(
            f"num_epochs must be at least {walked.num_epochs}, as many as the checkpoint holds; "
            f"got {num_epochs}"
        )
    parts, first = [walked], walked.num_epochs
    left = num_epochs - first if int(walked.state.verdict) == RUNNING else 0
    capacity = max(RECORDS_PER_CHUNK // steps_per_epoch, 1)
    started = saved = time.monotonic()
    lowest = _lowest(walked)
    try:
        for chunk in chunks(left, largest=capacity, unit="epochs", show=progress):
            begin, size = np.uint32(first + chunk.begin), np.uint32(chunk.end - chunk.begin)
            state, records = descend(parts[-1].state, begin, size, capacity=capacity)
            parts.append(_walked(parts[-1], state, records))
            lowest = min(lowest, _lowest(parts[-1]))
            chunk.report(lowest)
            evaluations = round(parts[-1].num_epochs * work_per_epoch)
            if ask_to_stop(limits, started, SearchProgress(evaluations, lowest)):
                parts[-1] = parts[-1]._replace(stopped=True)
            if int(state.verdict) != RUNNING or parts[-1].stopped:
                break
            if saver and time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                parts = [_joined(parts)]
                _save(saver, parts[0])
                saved = time.monotonic()
    finally:
        walked = _joined(parts)
        if saver:
            _save(saver, walked)
    return walked


def _walked(before: Walked, state: State, records: Records) -> Walked:
    """A chunk on its own; epochs are counted from the first on."""
    epochs = int(records.num_epochs)
    validation = np.zeros(0, state.loss.dtype)
    if records.validation is not None:
        validation = np.asarray(records.validation)[:epochs].copy()
    losses = np.asarray(records.loss)[: int(records.num_steps)].copy()
    return Walked(state, losses, validation, before.num_epochs + epochs, stopped=False)


def _lowest(walked: Walked) -> float:
    """The lowest finite loss before a step; inf if there is none."""
    return float(np.min(walked.losses, where=np.isfinite(walked.losses), initial=np.inf))


def _joined(parts: list[Walked]) -> Walked:
    return parts[-1]._replace(
        losses=np.concatenate([part.losses for part in parts]),
        validation=np.concatenate([part.validation for part in parts]),
    )


def _resumed(saver: Saver | None, start: Walked) -> Walked:
    saved = saver and saver.load()
    if not saved:
        return start
    arrays, facts = saved
    state = with_leaves(start.state, arrays)
    return Walked(state, arrays["losses"], arrays["validation"], facts["next"], stopped=False)


def _save(saver: Saver, walked: Walked) -> None:
    arrays = {"losses": walked.losses, "validation": walked.validation}
    state: Any = jax.tree.map(np.asarray, walked.state)
    saver.save({**arrays, **numbered_leaves(state)}, {"next": walked.num_epochs})
