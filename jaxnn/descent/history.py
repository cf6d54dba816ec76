"""A gradient descent as work for the host's loop: chunks of epochs, and what is kept of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxnn.descent.kernel import RUNNING, Records, State
from jaxnn.run.checkpoint import Checkpoint, arrays_to_tree, tree_to_arrays
from jaxnn.run.loop import Limits, Progress, Work, record_interval, run
from jaxnn.typing import Status

RECORDS_PER_CHUNK = 2**17
SECONDS_PER_BLOCK, MOST_SECONDS = 0.015, 1.0
"""A chunk takes so long for each block of networks, or calling them would take longest."""


class Kept(NamedTuple):
    """What is kept of the steps; with a second axis of networks, or one, where there are several.

    Attributes:
        step: which steps, from 0 on, `(records,)`, int64.
        loss: before each of them, `(records,)`; nan where a network had stopped.
        epoch: after which epochs the validation loss is kept, `(validations,)`, int64.
        validation: the loss on the validation batch, `(validations,)`; empty without one.
    """

    step: np.ndarray
    loss: np.ndarray
    epoch: np.ndarray
    validation: np.ndarray


class Walked(NamedTuple):
    """How far a descent came; arrays of networks, where there are several.

    Attributes:
        state: where it stands: a `State`, or one for each block of networks.
        num_steps: steps made, int64.
        lowest: the lowest finite loss before a step; inf if there was none.
        num_epochs: epochs begun, by any network.
        kept: the history, once the descent is over.
    """

    state: State | tuple[State, ...]
    num_steps: np.ndarray
    lowest: np.ndarray
    num_epochs: int
    kept: Kept


def walk(
    descend: Callable[..., tuple[Any, Records]],
    state: State | tuple[State, ...],
    num_epochs: int,
    steps_per_epoch: int,
    work_per_step: float,
    limits: Limits,
    checkpoint: Checkpoint | None,
    record_every: int | None,
) -> tuple[Walked, Status]:
    """Descends chunk after chunk, from the start or from the checkpoint.

    Args:
        descend: `descend(state, first_epoch, num_epochs, capacity=...)` -> state and records.
        state: before the first step; of several networks, one for each block.
        num_epochs: epochs in all.
        steps_per_epoch: steps of each.
        work_per_step: evaluations of each step, for the callback.
        limits: when to end.
        checkpoint: where to save.
        record_every: which steps to keep, every one or every second and so on; None to choose.

    Returns:
        How far it came, and why it ended; a network's own reason is in its state.
    """
    blocks = _blocks(state)
    has_validation = blocks[0].best is not None
    walked, saved_every = _begin(state, checkpoint, num_epochs)
    width = 8 + (1 + has_validation) * walked.lowest.size * blocks[0].loss.dtype.itemsize
    every = record_every or record_interval(saved_every, width, num_epochs * steps_per_epoch)
    parts = [_thinned(walked, every, steps_per_epoch)]
    capacity = max(RECORDS_PER_CHUNK // (steps_per_epoch * walked.lowest.size), 1)

    def advance(walked: Walked, begin: int, end: int) -> tuple[Walked, Status | None]:
        size = np.uint32(end - begin)
        state, records = descend(walked.state, np.uint32(begin), size, capacity=capacity)
        after = _after(walked, state, records, steps_per_epoch)
        parts.append(_thinned(after, every, steps_per_epoch))
        return after._replace(kept=parts[-1]), None if _runs(state) else "converged"

    def progress(walked: Walked) -> Progress:
        evaluations = round(int(np.sum(walked.num_steps)) * work_per_step)
        return Progress(evaluations, float(np.min(walked.lowest)))

    def content(walked: Walked):
        def history() -> dict[str, np.ndarray]:
            parts[:] = [_joined(parts)]
            return parts[0]._asdict()

        steps = {"num_steps": walked.num_steps, "lowest": walked.lowest}
        arrays = {**steps, **tree_to_arrays(walked.state)}
        return arrays, {"next": walked.num_epochs, "record_every": every}, history

    work = Work(
        advance,
        progress,
        content,
        total=num_epochs,
        largest=capacity,
        unit="epochs",
        seconds=min(SECONDS_PER_BLOCK * len(blocks), MOST_SECONDS),
    )
    ending: Status | None = None if _runs(walked.state) else "converged"
    walked, status = run(work, walked, walked.num_epochs, ending, limits, checkpoint)
    return walked._replace(kept=_joined(parts)), status


def _blocks(state: State | tuple[State, ...]) -> tuple[State, ...]:
    return (state,) if isinstance(state, State) else state


def _runs(state: State | tuple[State, ...]) -> bool:
    return any(np.any(np.asarray(block.verdict) == RUNNING) for block in _blocks(state))


def _begin(
    state: State | tuple[State, ...], checkpoint: Checkpoint | None, num_epochs: int
) -> tuple[Walked, int | None]:
    """Where to go on, at the start or as saved; and which steps were recorded."""
    blocks = _blocks(state)
    networks = (len(blocks) * blocks[0].verdict.size,) if blocks[0].verdict.ndim else ()
    nothing, none = np.zeros((0, *networks), blocks[0].loss.dtype), np.zeros(0, np.int64)
    no_steps, unmet = np.zeros(networks, np.int64), np.full(networks, np.inf)
    fresh = Walked(state, no_steps, unmet, 0, Kept(none, nothing, none, nothing))
    saved = checkpoint and checkpoint.begin(
        tree_to_arrays(state), ("num_epochs", num_epochs), has_history=True
    )
    if not saved:
        return fresh, None
    arrays, facts, history = saved
    kept = fresh.kept if history is None else Kept(**history)
    walked = Walked(
        arrays_to_tree(state, arrays), arrays["num_steps"], arrays["lowest"], facts["next"], kept
    )
    return walked, facts["record_every"]


def _after(before: Walked, state: Any, records: Records, steps_per_epoch: int) -> Walked:
    """Where the descent stands after a chunk, with all that was recorded of the chunk."""
    longest = int(np.max(records.num_steps))
    epochs = -(-longest // steps_per_epoch)
    losses, validation = np.asarray(records.loss)[:longest], before.kept.validation[:0]
    if records.validation is not None:
        validation = np.asarray(records.validation)[:epochs]
    first = before.num_epochs
    finite = np.where(np.isfinite(losses), losses, np.inf)
    return Walked(
        state,
        before.num_steps + np.asarray(records.num_steps),
        np.minimum(before.lowest, np.min(finite, axis=0, initial=np.inf)),
        first + epochs,
        Kept(
            first * steps_per_epoch + np.arange(longest, dtype=np.int64),
            losses,
            first + np.arange(len(validation), dtype=np.int64),
            validation,
        ),
    )


def _thinned(walked: Walked, every: int, steps_per_epoch: int) -> Kept:
    """The records of every `every`-th step, and of as many epochs, as far as the state came."""
    step, loss, epoch, validation = walked.kept
    is_kept = ((step + 1) % every == 0) & (step < walked.num_epochs * steps_per_epoch)
    epochs = -(-every // steps_per_epoch)
    has_epoch = ((epoch + 1) % epochs == 0) & (epoch < walked.num_epochs)
    return Kept(step[is_kept], loss[is_kept], epoch[has_epoch], validation[has_epoch])


def _joined(parts: Sequence[Kept]) -> Kept:
    return Kept(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
