"""The host's walk over the epochs of a gradient descent: chunks, limits and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxnn.descent.kernel import RUNNING, Records, State
from jaxnn.run.naming import numbered_leaves, with_leaves
from jaxnn.run.pacing import chunks
from jaxnn.run.stopping import (
    SECONDS_BETWEEN_SAVES,
    Limits,
    Saver,
    SearchProgress,
    ask_to_stop,
)

__all__ = ["Walked", "walk"]

RECORDS_PER_CHUNK = 2**17
SECONDS_PER_BLOCK = 0.015
"""Of a chunk, lest it go by in calling the blocks."""
MOST_SECONDS = 1.0
SAVED = ("losses", "validation", "num_steps")


class Walked(NamedTuple):
    """How far a descent came; with a second axis of networks, or one, where there are several.

    Attributes:
        state: where it stands: a `State`, or one for each block of networks.
        losses: before every step, `(steps,)`; nan where a network had stopped.
        validation: after every epoch on the validation batch, `(epochs,)`; empty without one.
        num_steps: steps made, int64.
        num_epochs: epochs begun, by any network.
        stopped: whether a limit ended it.
    """

    state: State | tuple[State, ...]
    losses: np.ndarray
    validation: np.ndarray
    num_steps: np.ndarray
    num_epochs: int
    stopped: bool


def walk(
    descend: Callable[..., tuple[Any, Records]],
    state: State | tuple[State, ...],
    num_epochs: int,
    steps_per_epoch: int,
    work_per_step: float,
    limits: Limits,
    saver: Saver | None,
    *,
    is_interrupted: Callable[[], bool],
    progress: bool,
) -> Walked:
    """Descends chunk after chunk, from the start or from the checkpoint.

    Args:
        descend: `descend(state, first_epoch, num_epochs, capacity=...)` -> state and records.
        state: before the first step; of several networks, one for each block.
        num_epochs: epochs in all.
        steps_per_epoch: steps of each.
        work_per_step: evaluations of each step, for the callback.
        limits: when to end.
        saver: where to save.
        is_interrupted: whether to end with the chunk at hand.
        progress: whether to show a progress bar.

    Returns:
        A `Walked`.
    """
    blocks = _blocks(state)
    nothing = np.zeros((0, *_networks(blocks)), blocks[0].loss.dtype)
    no_steps = np.zeros(_networks(blocks), np.int64)
    walked = _resumed(saver, Walked(state, nothing, nothing, no_steps, 0, stopped=False))
    if walked.num_epochs > num_epochs:
        raise ValueError(
            f"num_epochs must be at least {walked.num_epochs}, as many as the checkpoint holds; "
            f"got {num_epochs}"
        )
    parts, first = [walked], walked.num_epochs
    left = num_epochs - first if _runs(walked.state) else 0
    capacity = max(RECORDS_PER_CHUNK // (steps_per_epoch * blocks[0].verdict.size), 1)
    seconds = min(SECONDS_PER_BLOCK * len(blocks), MOST_SECONDS)
    started = saved = time.monotonic()
    lowest = _lowest(walked)
    try:
        for chunk in chunks(
            left,
            largest=capacity,
            unit="epochs",
            is_interrupted=is_interrupted,
            show=progress,
            seconds=seconds,
        ):
            begin, size = np.uint32(first + chunk.begin), np.uint32(chunk.end - chunk.begin)
            state, records = descend(parts[-1].state, begin, size, capacity=capacity)
            parts.append(_walked(parts[-1], state, records, steps_per_epoch))
            lowest = min(lowest, _lowest(parts[-1]))
            chunk.report(lowest)
            evaluations = round(int(np.sum(parts[-1].num_steps)) * work_per_step)
            if ask_to_stop(limits, started, SearchProgress(evaluations, lowest)):
                parts[-1] = parts[-1]._replace(stopped=True)
            if not _runs(state) or parts[-1].stopped:
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


def _blocks(state: State | tuple[State, ...]) -> tuple[State, ...]:
    return (state,) if isinstance(state, State) else state


def _networks(blocks: tuple[State, ...]) -> tuple[int, ...]:
    """The axis of networks, if there is one."""
    return (len(blocks) * blocks[0].verdict.size,) if blocks[0].verdict.ndim else ()


def _runs(state: State | tuple[State, ...]) -> bool:
    return any(np.any(np.asarray(block.verdict) == RUNNING) for block in _blocks(state))


def _walked(before: Walked, state: Any, records: Records, steps_per_epoch: int) -> Walked:
    """A chunk on its own; steps and epochs are counted from the first on."""
    longest = int(np.max(records.num_steps))
    epochs = -(-longest // steps_per_epoch)
    validation = before.validation[:0]
    if records.validation is not None:
        validation = np.asarray(records.validation)[:epochs].copy()
    losses = np.asarray(records.loss)[:longest].copy()
    num_steps = before.num_steps + np.asarray(records.num_steps)
    return Walked(state, losses, validation, num_steps, before.num_epochs + epochs, stopped=False)


def _lowest(walked: Walked) -> float:
    """The lowest finite loss before a step; inf if there is none."""
    return float(np.min(walked.losses, where=np.isfinite(walked.losses), initial=np.inf))


def _joined(parts: list[Walked]) -> Walked:
    return parts[-1]._replace(
        losses=np.concatenate([part.losses for part in parts]),
        validation=np.concatenate([part.validation for part in parts]),
    )


def _resumed(saver: Saver | None, start: Walked) -> Walked:
    saved = saver and saver.begin(numbered_leaves(jax.tree.map(np.asarray, start.state)))
    if not saved:
        return start
    arrays, facts, _ = saved
    state = with_leaves(start.state, arrays)
    records = (arrays[name] for name in SAVED)
    return Walked(state, *records, num_epochs=facts["next"], stopped=False)


def _save(saver: Saver, walked: Walked) -> None:
    arrays = {name: getattr(walked, name) for name in SAVED}
    state: Any = jax.tree.map(np.asarray, walked.state)
    saver.save({**arrays, **numbered_leaves(state)}, {"next": walked.num_epochs})
