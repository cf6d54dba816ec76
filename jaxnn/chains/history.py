"""What a perturbation search tells of its steps: records of the loop, thinned on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxnn.chains.kernel import Records, State

MOST_ACCEPTED = 2**20
"""Accepted steps listed; chains that accept more are told of by the history alone."""


class ChainHistory(NamedTuple):
    """What happened at every step, or at every `record_every`-th; ready to plot.

    After a resumed search, steps whose history was not saved are missing.

    Shapes are `(records,)`, or `(num_chains, records)` if `num_chains` was given. A loss that is
    not finite stands as inf.

    Attributes:
        evaluations: evaluations of a chain up to and with each step recorded, int64; `(records,)`.
        proposed_loss: loss of the proposal, the best one if there were several.
        current_loss: loss of the chain after the step.
        best_loss: lowest loss of the chain up to and with the step.
        accepted: whether the proposal was taken, bool.
        num_accepted: proposals taken up to and with the step, int64.
        scale: the step size of the proposal, float32.
        temperature: the temperature, float32, `(records,)`; None if there is none.
        proposed_metric: `metric_fn` of the proposal; None if there was no `metric_fn`.
        current_metric: `state_metric_fn` of the chain after the step; None if there was none.
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


class AcceptedSteps(NamedTuple):
    """Every accepted step, the first million of them, by step and then by chain.

    Attributes:
        chain: the chain, int64.
        step: the step, from 0 on, int64.
        loss: the loss of the proposal taken.
    """

    chain: np.ndarray
    step: np.ndarray
    loss: np.ndarray


class Pieces(NamedTuple):
    """The records of some steps, thinned: `(chains, records)`, and what was accepted.

    `step` says which steps these are, from 0 on, `(records,)`, int64.
    """

    step: np.ndarray
    proposed_loss: Any
    current_loss: Any
    best_loss: Any
    accepted: Any
    num_accepted: Any
    scale: Any
    proposed_metric: Any
    current_metric: Any
    listed: AcceptedSteps


def pieces_of(records: Records, before: State, first: int, every: int) -> Pieces:
    """What to keep of `records`, `(chains, steps)` from step `first` on; `before` is at `first`."""
    accepted, metric = records.accepted, records.state_metric
    steps = np.arange(accepted.shape[1], dtype=np.int32)
    kept = steps[(-first - 1) % every :: every]
    last = _until(np.maximum, np.where(accepted, steps, np.int32(-1)), kept)
    unmet = records.loss.dtype.type(np.inf)
    lowest = _until(np.minimum, np.where(accepted, records.loss, unmet), kept)

    def since(values: np.ndarray, start: np.ndarray) -> np.ndarray:
        """The value at the last accepted step, or that of the start."""
        filled = np.take_along_axis(values, np.maximum(last, 0), axis=1)
        return np.where(last < 0, start[:, None], filled)

    counts = _until(np.add, accepted.astype(np.int32), kept)
    is_full = np.sum(before.num_accepted, dtype=np.int64) >= MOST_ACCEPTED
    chain, step = np.nonzero(accepted[:, : 0 if is_full else None])
    order = np.argsort(step, kind="stable")
    chain, step = chain[order], step[order]
    return Pieces(
        first + kept.astype(np.int64),
        np.take(records.loss, kept, axis=1),
        since(records.loss, before.loss),
        np.minimum(lowest, before.best_loss[:, None]),
        np.take(accepted, kept, axis=1),
        before.num_accepted[:, None].astype(np.int64) + counts,
        None if records.scale is None else np.take(records.scale, kept, axis=1),
        None if records.metric is None else np.take(records.metric, kept, axis=1),
        None if metric is None else since(metric, before.metric),
        AcceptedSteps(chain, first + step, records.loss[chain, step]),
    )


def _until(ufunc: np.ufunc, values: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """`ufunc` over all values up to and with each step kept, `(chains, kept)`."""
    if not kept.size:
        return values[:, :0]
    firsts = np.append(0, kept[:-1] + 1)
    pieces = ufunc.reduceat(values[:, : kept[-1] + 1], firsts, axis=1)
    return ufunc.accumulate(pieces, axis=1)


def join_pieces(pieces: Sequence[Pieces]) -> Pieces:
    """Pieces that follow each other as one."""
    joined = jax.tree.map(
        lambda *parts: np.concatenate(parts, axis=-1), *(p._replace(listed=None) for p in pieces)
    )
    listed = (np.concatenate(parts) for parts in zip(*(p.listed for p in pieces), strict=True))
    return joined._replace(listed=AcceptedSteps(*(part[:MOST_ACCEPTED] for part in listed)))


def thinned(pieces: Pieces, end: int, every: int) -> Pieces:
    """The records of every `every`-th step, before step `end`."""
    kept = (pieces.step < end) & ((pieces.step + 1) % every == 0)
    listed = AcceptedSteps(*(part[pieces.listed.step < end] for part in pieces.listed))
    records = jax.tree.map(lambda leaf: leaf[..., kept], pieces._replace(listed=None))
    return records._replace(listed=listed)


def bytes_per_step(pieces: Pieces) -> int:
    """What the record of a step takes, of all chains; the history has a step size in any case."""
    kinds = jax.tree.leaves(pieces._replace(step=None, scale=None, listed=None))
    return 8 + len(pieces.proposed_loss) * (sum(leaf.dtype.itemsize for leaf in kinds) + 4)


def as_history(
    pieces: Pieces,
    num_proposals: int,
    scale: Callable[[np.ndarray], np.ndarray],
    temperature: Callable[[np.ndarray], np.ndarray] | None,
    *,
    one_chain: bool,
) -> ChainHistory:
    """The history; `scale(steps)` and `temperature(steps)` are what the schedules say."""
    steps = pieces.step
    scales = pieces.scale
    if scales is None:
        scales = np.tile(scale(steps), (len(pieces.proposed_loss), 1))

    def by_chain(values: np.ndarray | None) -> Any:
        return values if values is None or not one_chain else values[0]

    return ChainHistory(
        evaluations=1 + num_proposals * (steps + 1),
        proposed_loss=by_chain(pieces.proposed_loss),
        current_loss=by_chain(pieces.current_loss),
        best_loss=by_chain(pieces.best_loss),
        accepted=by_chain(pieces.accepted),
        num_accepted=by_chain(pieces.num_accepted),
        scale=by_chain(scales),
        temperature=None if temperature is None else temperature(steps),
        proposed_metric=by_chain(pieces.proposed_metric),
        current_metric=by_chain(pieces.current_metric),
    )
