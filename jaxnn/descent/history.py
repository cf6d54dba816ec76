"""The host's part of a descent: chunks of epochs, and what is kept of their steps.

A long descent keeps every second, fourth and so on step, so that its history fits a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxnn.descent.kernel import RUNNING, BatchPlan, Chunk, RunState, best_params
from jaxnn.descent.replicas import Networks, join, numbers
from jaxnn.run.checkpoint import Checkpoint, arrays_to_tree, tree_to_arrays
from jaxnn.run.loop import Limits, Progress, Work, record_interval, run
from jaxnn.typing import PyTree, Status

EVALUATIONS_PER_GRADIENT = 3
"""A forward pass, and a backward pass that costs twice as much."""
RECORDS_PER_CHUNK, EPOCHS_PER_CHUNK, MOST_RECORDS = 2**17, 16, 2**22
"""A chunk records up to 2^17 losses. Of many networks it records 16 epochs, up to 2^22 losses."""
SECONDS_PER_BLOCK, MOST_SECONDS = 0.015, 1.0
"""A chunk takes so long for each block of networks, or calling them would take longest."""

Blocks = tuple[RunState, ...]


class History(NamedTuple):
    """What is kept of the steps, as a checkpoint holds it; networks in the second axis."""

    step: np.ndarray  # which steps, from 0 on, `(records,)`, int64
    loss: np.ndarray  # before each of them, `(records, networks)`; nan once a network has stopped
    epoch: np.ndarray  # after which epochs the rest is kept, `(epochs,)`, int64
    validation_loss: np.ndarray  # after each of them, `(epochs, networks)`; no rows if unwanted
    metric: np.ndarray
    validation_metric: np.ndarray


def run_descent(
    advance_blocks: Callable[..., list[Chunk]],
    blocks: Blocks,
    num_epochs: int,
    plan: BatchPlan,
    networks: Networks,
    limits: Limits,
    checkpoint: Checkpoint | None,
    has_metric: bool,
) -> tuple[Blocks, History, Status]:
    """Descend chunk after chunk, from the start or from the checkpoint.

    `advance_blocks(blocks, first_epoch, num_epochs, capacity=...)` returns of each block what
    `run_epochs` returns. The status is that of the run; a network's own is in its state.
    """
    given = plan, networks, checkpoint, has_metric
    blocks, history, interval = _begin(blocks, num_epochs, *given)
    parts = [history]
    losses = plan.steps_per_epoch * (networks.count or 1)  # of an epoch
    records = min(max(RECORDS_PER_CHUNK, EPOCHS_PER_CHUNK * losses), MOST_RECORDS)
    capacity = max(records // losses, 1)

    def advance(before: Blocks, begin: int, end: int) -> tuple[Blocks, Status | None]:
        chunk = np.uint32(begin), np.uint32(end - begin)
        results = advance_blocks(before, *chunk, capacity=capacity)
        after = tuple(state for state, _, _ in results)
        records = _records(before, results, plan, networks)
        parts.append(_thinned(records, interval, plan, _epochs_begun(after, plan)))
        return after, None if _runs(after) else "converged"

    def progress(blocks: Blocks) -> Progress:
        rows = EVALUATIONS_PER_GRADIENT * int(np.sum(plan.rows_of_steps)) / plan.num_rows
        steps = int(np.sum(num_steps(blocks, networks)))
        lowest = min(float(np.min(np.asarray(block.lowest_loss))) for block in blocks)

        def best() -> PyTree:
            params = join([best_params(block) for block in blocks], networks)
            return params if np.isfinite(lowest) else None

        return Progress(round(steps * rows / plan.steps_per_epoch), lowest, best)

    def content(blocks: Blocks):
        def history() -> dict[str, np.ndarray]:
            parts[:] = [_joined(parts)]
            return parts[0]._asdict()

        metadata = {"next": _epochs_begun(blocks, plan), "record_every": interval}
        return tree_to_arrays(blocks), metadata, history

    work = Work(
        advance,
        progress,
        content,
        total=num_epochs,
        largest=capacity,
        unit="epochs",
        seconds=min(SECONDS_PER_BLOCK * len(blocks), MOST_SECONDS),
    )
    ending: Status | None = None if _runs(blocks) else "converged"
    done = _epochs_begun(blocks, plan)
    blocks, status = run(work, blocks, done, ending, limits, checkpoint)
    return blocks, _joined(parts), status


def _begin(
    blocks: Blocks,
    num_epochs: int,
    plan: BatchPlan,
    networks: Networks,
    checkpoint: Checkpoint | None,
    has_metric: bool,
) -> tuple[Blocks, History, int]:
    """State and history at the start, or as saved; and every how many steps one is recorded."""
    count, dtype = networks.count or 1, blocks[0].loss.dtype
    none, nothing = np.zeros(0, np.int64), np.zeros((0, count), dtype)
    history, interval = History(none, nothing, none, nothing, nothing, nothing), None
    asked = "num_epochs", num_epochs
    saved = checkpoint and checkpoint.begin(tree_to_arrays(blocks), asked, has_history=True)
    if saved:
        blocks = _placed(arrays_to_tree(blocks, saved.arrays), blocks, networks)
        interval = saved.metadata["record_every"]
        history = history if saved.history is None else History(**saved.history)
    columns = 1 + (blocks[0].best is not None) * (1 + has_metric) + has_metric
    width = 8 + columns * count * max(dtype.itemsize, 4)
    interval = record_interval(interval, width, num_epochs * plan.steps_per_epoch)
    return blocks, _thinned(history, interval, plan, _epochs_begun(blocks, plan)), interval


def _placed(loaded: Blocks, blocks: Blocks, networks: Networks) -> Blocks:
    """Many networks where their blocks were, so that nothing is compiled anew."""
    if networks.count is None:
        return loaded
    return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), loaded, blocks)


def num_steps(blocks: Sequence[RunState], networks: Networks) -> np.ndarray:
    """Steps that each network has made, `(networks,)`, int64."""
    return numbers([block.state.step for block in blocks], networks).astype(np.int64)


def _runs(blocks: Blocks) -> bool:
    return any(np.any(np.asarray(block.status_code) == RUNNING) for block in blocks)


def _epochs_begun(blocks: Blocks, plan: BatchPlan) -> int:
    """By any network."""
    longest = max(int(np.max(np.asarray(block.state.step))) for block in blocks)
    return -(-longest // plan.steps_per_epoch)


def _records(before: Blocks, results: list[Chunk], plan: BatchPlan, networks: Networks) -> History:
    """All that was recorded of a chunk; nan from where a network had stopped."""
    after = [state for state, _, _ in results]
    steps = num_steps(after, networks) - num_steps(before, networks)
    epochs = -(-steps // plan.steps_per_epoch)
    first = _epochs_begun(before, plan)

    def kept(blocks: Sequence[jax.Array], made: np.ndarray) -> np.ndarray:
        cut = [np.atleast_2d(np.asarray(block))[:, : np.max(made)] for block in blocks]
        joined = np.concatenate(cut)[: networks.count].T
        joined[np.arange(len(joined))[:, None] >= made] = np.nan
        return joined

    loss = kept([losses for _, losses, _ in results], steps)
    by_epoch = [
        loss[:0] if column[0] is None else kept(column, epochs)
        for column in zip(*(records for _, _, records in results), strict=True)
    ]
    return History(
        first * plan.steps_per_epoch + np.arange(len(loss), dtype=np.int64),
        loss,
        first + np.arange(max(map(len, by_epoch)), dtype=np.int64),
        *by_epoch,
    )


def _thinned(history: History, interval: int, plan: BatchPlan, num_epochs: int) -> History:
    """The records of every `interval`-th step, and of as many epochs, as far as the state came."""
    step, loss, epoch, *by_epoch = history
    is_kept = ((step + 1) % interval == 0) & (step < num_epochs * plan.steps_per_epoch)
    epochs = -(-interval // plan.steps_per_epoch)
    has_epoch = ((epoch + 1) % epochs == 0) & (epoch < num_epochs)
    by_epoch = [leaf[has_epoch] if len(leaf) else leaf for leaf in by_epoch]
    return History(step[is_kept], loss[is_kept], epoch[has_epoch], *by_epoch)


def _joined(parts: Sequence[History]) -> History:
    return History(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
