"""What a gradient descent returns: the result, its history, and the words of its status."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnn.descent.epochs import Walked
from jaxnn.descent.kernel import CONVERGED, DIVERGED, REACHED
from jaxnn.descent.setup import Seen

__all__ = ["EVALUATIONS_PER_GRADIENT", "DescentHistory", "GradientDescentResult", "report"]

EVALUATIONS_PER_GRADIENT = 3
"""A forward pass, and a backward pass that costs twice as much."""


class DescentHistory(NamedTuple):
    """The loss at every step; ready to plot.

    Of several networks `loss` and `validation_loss` have a first axis of networks, with nan from
    where a network had stopped.

    Attributes:
        evaluations: evaluations made by a network up to and with each step, in units of one loss
            on the whole batch, `(num_steps,)`, float64.
        loss: loss of the step's batch *before* the step, `(num_steps,)`.
        validation_loss: loss on the validation batch after every epoch, `(num_epochs,)`; None
            without one.
    """

    evaluations: np.ndarray
    loss: np.ndarray
    validation_loss: np.ndarray | None


class GradientDescentResult(NamedTuple):
    """Where a gradient descent ended; of several networks, arrays with a first axis of networks.

    Attributes:
        params: the params reached; if it diverged, the last whose loss was finite; with a
            validation batch, those at the end of the epoch with the lowest loss on it.
        loss: their loss on the whole batch; inf if it is not finite.
        num_evaluations: losses on the whole batch that the work amounts to: a gradient step
            counts 3 times its share of the rows, the loss reported counts 1; rounded up. Losses
            on a validation batch are not counted.
        num_steps: gradients evaluated; the last is that at which it converged or diverged.
        status: "completed", "converged", "diverged", "interrupted", "reached", "stopped", or
            "nonfinite" if no loss was ever finite; a `Status`.
        history: the loss at every step.
    """

    params: Any
    loss: Any
    num_evaluations: Any
    num_steps: Any
    status: Any
    history: DescentHistory


def report(
    walked: Walked, settled: tuple[Any, Any, Any], seen: Seen, validates: bool, is_complete: bool
) -> GradientDescentResult:
    """What to return, of one network or of several: surplus networks at the end are left out.

    Args:
        walked: how far the descent came.
        settled: params, losses and verdicts, as of `settle`.
        seen: rows that the steps of an epoch see.
        validates: whether there is a validation batch.
        is_complete: whether all epochs were begun.

    Returns:
        A `GradientDescentResult`.
    """
    params, loss, verdict = settled
    loss, verdict = np.asarray(loss), np.asarray(verdict)
    here = np.s_[..., : len(verdict)] if verdict.ndim else ...
    losses, validation, num_steps = (
        array[here] for array in (walked.losses, walked.validation, walked.num_steps)
    )
    work = np.cumsum(np.resize(seen.rows_of_steps, len(losses))) * EVALUATIONS_PER_GRADIENT
    unstopped = "completed" if is_complete else "stopped" if walked.stopped else "interrupted"
    has_finite = np.isfinite(loss) | np.any(np.isfinite(losses), axis=0)
    result = GradientDescentResult(
        params=jax.tree.map(jnp.asarray, params),
        loss=np.where(np.isfinite(loss), loss, np.inf).astype(np.float64),
        num_evaluations=1 - (-np.append(0, work)[num_steps] // seen.rows),
        num_steps=num_steps,
        status=np.select(
            [
                (verdict == DIVERGED) & ~has_finite,
                *(verdict == ending for ending in (DIVERGED, CONVERGED, REACHED)),
            ],
            ["nonfinite", "diverged", "converged", "reached"],
            unstopped,
        ),
        history=DescentHistory(
            work / seen.rows,
            np.ascontiguousarray(losses.T),
            np.ascontiguousarray(validation.T) if validates else None,
        ),
    )
    return result if verdict.ndim else _of_one(result)


def _of_one(result: GradientDescentResult) -> GradientDescentResult:
    """The numbers of a single network as plain ones."""
    return result._replace(
        loss=float(result.loss),
        num_evaluations=int(result.num_evaluations),
        num_steps=int(result.num_steps),
        status=str(result.status),
    )
