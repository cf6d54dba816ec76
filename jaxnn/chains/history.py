"""What a perturbation search tells of its steps: records of the loop, thinned on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import numpy as np

from jaxnn.chains.kernel import Problem, State, initial_scale
from jaxnn.optim.schedules import values_at
from jaxnn.run.show import readable

Array = TypeVar("Array", np.ndarray, jax.Array)

MOST_ACCEPTED = 2**20
"""Accepted steps listed; of chains that accept more, the history tells alone."""


@readable
class ChainHistory(NamedTuple):
    """What happened at every step; ready to plot.

    Of long runs every second step is kept, or every fourth and so on, so that the history takes
    at most 768 MiB. After a resumed search, steps whose history was not saved are missing.

    Shapes are `(records,)`, or `(num_chains, records)` if `num_chains` was given. A loss that is
    not finite is recorded as inf.

    Attributes:
        evaluations: evaluations of a chain up to and with each step recorded, int64; `(records,)`.
        proposed_loss: loss of the proposal, the best one if there were several.
        current_loss: loss of the chain after the step.
        best_loss: lowest loss of the chain up to and with the step.
        accepted: whether the proposal was accepted, bool.
        num_accepted: proposals accepted up to and with the step, int64.
        scale: the step size of the proposal, float32.
        temperature: the temperature, float32, `(records,)`; None if there is none above 0.
        proposed_metric: `metric_fn` of the proposal; None if there was no `metric_fn`.
        current_metric: `metric_fn` of the chain after the step; None if there was no `metric_fn`.
    """

    evaluations: np.ndarray
    proposed_loss: np.ndarray
    current_loss: np.ndarray
    best_loss: np.ndarray
    accepted: np.ndarray
    num_accepted: np.ndarray
    scale: np.ndarray
    temperature: np.ndarray | None
    proposed_metric: np.ndarray | None
    current_metric: np.ndarray | None


@readable
class AcceptedSteps(NamedTuple):
    """Every accepted step, the first million of them, by step and then by chain.

    Attributes:
        chain: the chain, int64.
        step: the step, from 0 on, int64.
        loss: the loss of the proposal accepted.
    """

    chain: np.ndarray
    step: np.ndarray
    loss: np.ndarray


class Records(NamedTuple, Generic[Array]):
    """What the compiled loop keeps of each step, `(chains, steps)`; None for what is not wanted."""

    loss: Array
    accepted: Array
    scale: Array | None
    metric: Any


Piece = tuple[ChainHistory, AcceptedSteps]
"""Of some steps: `evaluations` counts the steps and schedules are left out until `finalize`."""


def record(
    records: Records[np.ndarray], before: State, metric: np.ndarray | None, first: int, every: int
) -> Piece:
    """Return what to keep of the steps from `first` on; `before` and `metric` are from there."""
    accepted, losses = records.accepted, records.loss
    kept = np.arange(accepted.shape[1])[(-first - 1) % every :: every]
    lowest = _until(np.minimum, np.where(accepted, losses, losses.dtype.type(np.inf)), kept)
    count = _until(np.add, accepted.astype(np.int32), kept)
    is_full = np.sum(before.num_accepted, dtype=np.int64) >= MOST_ACCEPTED
    chain, step = np.nonzero(accepted[:, : 0 if is_full else None])
    order = np.argsort(step, kind="stable")
    chain, step = chain[order], step[order]
    at_kept: Any = jax.tree.map(lambda leaf: np.take(leaf, kept, axis=1), records)
    history = ChainHistory(
        evaluations=first + 1 + kept.astype(np.int64),
        proposed_loss=at_kept.loss,
        current_loss=latest(accepted, losses, before.loss, kept),
        best_loss=np.minimum(lowest, before.best_loss[:, None]),
        accepted=at_kept.accepted,
        num_accepted=np.asarray(before.num_accepted, np.int64)[:, None] + count,
        scale=at_kept.scale,
        temperature=None,
        proposed_metric=at_kept.metric,
        current_metric=None if metric is None else latest(accepted, records.metric, metric, kept),
    )
    return history, AcceptedSteps(chain, first + step, losses[chain, step])


def latest(
    accepted: np.ndarray, values: np.ndarray, before: np.ndarray | jax.Array, kept: np.ndarray
) -> np.ndarray:
    """Return the value at the last step accepted up to each step of `kept`, or that of before."""
    steps = np.arange(accepted.shape[1], dtype=np.int32)
    last = _until(np.maximum, np.where(accepted, steps, np.int32(-1)), kept)
    filled = np.take_along_axis(values, np.maximum(last, 0), axis=1)
    return np.where(last < 0, before[:, None], filled)


def _until(ufunc: np.ufunc, values: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """`ufunc` over all values up to and with each step kept, `(chains, kept)`."""
    if not kept.size:
        return values[:, :0]
    firsts = np.append(0, kept[:-1] + 1)
    pieces = ufunc.reduceat(values[:, : kept[-1] + 1], firsts, axis=1)
    return ufunc.accumulate(pieces, axis=1)


def join(pieces: Sequence[Piece]) -> Piece:
    """Return pieces that follow each other as one."""
    history, listed = jax.tree.map(lambda *parts: np.concatenate(parts, axis=-1), *pieces)
    return history, AcceptedSteps(*(column[:MOST_ACCEPTED] for column in listed))


def thinned(piece: Piece, end: int, every: int) -> Piece:
    """Return the records of every `every`-th step, before step `end`."""
    history, listed = piece
    kept = (history.evaluations <= end) & (history.evaluations % every == 0)
    history = jax.tree.map(lambda leaf: leaf[..., kept], history)
    return history, AcceptedSteps(*(column[listed.step < end] for column in listed))


def bytes_per_step(piece: Piece) -> int:
    """Return what the record of a step takes, of all chains; a step size in any case."""
    kinds = jax.tree.leaves(piece[0]._replace(evaluations=None, scale=None))
    return 8 + len(piece[0].accepted) * (sum(leaf.dtype.itemsize for leaf in kinds) + 4)


def finalize(history: ChainHistory, problem: Problem, *, one_chain: bool) -> ChainHistory:
    """Return the history with evaluations and schedules, without the axis of a single chain."""
    num_steps = history.evaluations
    if history.scale is None:
        scales = values_at(initial_scale(problem), num_steps - 1)
        history = history._replace(scale=np.tile(scales, (len(history.accepted), 1)))
    if one_chain:
        history = jax.tree.map(lambda leaf: leaf[0] if leaf.ndim == 2 else leaf, history)
    heat = problem.temperature
    return history._replace(
        evaluations=1 + problem.num_proposals * num_steps,
        temperature=None if heat is None else values_at(heat, num_steps - 1),
    )
