"""What ends a perturbation search before its last step, found in the records of a chunk."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxnn.chains.lookahead import Records, State
from jaxnn.run.loop import Status

__all__ = ["ChainRules", "first_stop", "status_before"]


class ChainRules(NamedTuple):
    """When a search ends before its last step.

    Attributes:
        target_loss: with the first step, of any chain, at or below.
        patience: with the first step after which no chain has got better for this many steps.
    """

    target_loss: float | None = None
    patience: int | None = None


def status_before(rules: ChainRules, state: State) -> Status | None:
    """Why there is nothing left to do at all; None if there is."""
    if rules.target_loss is not None and np.min(state.best_loss) <= rules.target_loss:
        return "reached"
    if rules.patience is not None and np.all(state.vain >= rules.patience):
        return "converged"
    return None


def first_stop(rules: ChainRules, records: Records, before: State) -> tuple[int, Status | None]:
    """How many of the steps are to be taken, and why no more."""
    steps = np.arange(records.accepted.shape[1])
    cut, status = len(steps), None
    if rules.target_loss is not None:
        hits = np.any(records.accepted & (records.loss <= rules.target_loss), axis=0)
        if np.any(hits):
            cut, status = int(np.argmax(hits)) + 1, "reached"
    if rules.patience is not None:
        losses = np.where(records.accepted, records.loss, np.inf)
        best = np.minimum.accumulate(np.c_[before.best_loss, losses], axis=1)
        last = np.maximum.accumulate(np.where(best[:, 1:] < best[:, :-1], steps, -1), axis=1)
        earlier = before.vain[:, None].astype(np.int64) + steps + 1
        over = np.all(np.where(last < 0, earlier, steps - last) >= rules.patience, axis=0)
        if np.any(over[:cut]):
            cut, status = int(np.argmax(over)) + 1, "converged"
    return cut, status
