"""What a gradient descent returns: the result, its history, and the words of its status."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnn.descent.epochs import Walked
from jaxnn.descent.kernel import CONVERGED, DIVERGED, REACHED
from jaxnn.descent.setup import Seen
from jaxnn.run.loop import summary
from jaxnn.typing import Status, traits_of

EVALUATIONS_PER_GRADIENT = 3
"""A forward pass, and a backward pass that costs twice as much."""
CONSTANT_MARGIN = 1e-3
"""Losses that are lower than that of the best constant answer by a smaller share are no better."""


class DescentHistory(NamedTuple):
    """The loss at every step, or at every `record_every`-th; ready to plot.

    Of several networks `loss` and `validation_loss` have a first axis of networks, with nan from
    where a network had stopped.

    Attributes:
        evaluations: evaluations made by a network up to and with each step, in units of one loss
            on the whole batch, `(records,)`, float64.
        loss: loss of the step's batch *before* the step, `(records,)`.
        validation_loss: loss on the validation batch after every epoch, `(validations,)`; None
            without one.
        validation_evaluations: evaluations made up to and with each of these epochs, float64.
    """

    evaluations: np.ndarray
    loss: np.ndarray
    validation_loss: np.ndarray | None
    validation_evaluations: np.ndarray | None


class GradientDescentResult(NamedTuple):
    """Where a gradient descent ended; of several networks, arrays with a first axis of networks.

    Printed, it is a summary of a few lines.

    Attributes:
        params: the params reached; if it diverged, the last whose loss was finite; with a
            validation batch, those at the end of the epoch with the lowest loss on it.
        loss: their loss on the whole batch; inf if it is not finite.
        num_evaluations: losses on the whole batch that the work amounts to: a gradient step
            counts 3 times its share of the rows, the loss reported counts 1; rounded up. Losses
            on a validation batch, and those that an optimizer evaluates itself, are not counted.
        num_steps: gradients evaluated; the last is that at which it converged or diverged.
        status: "completed", "converged", "diverged", "interrupted", "reached", "stopped", or
            "nonfinite" if no loss was ever finite; a `Status`.
        history: the loss at every step.
        notes: what else the summary says: that nothing changed the params, or that the loss is
            that of the best constant answer.
    """

    params: Any
    loss: Any
    num_evaluations: Any
    num_steps: Any
    status: Any
    history: DescentHistory
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The summary."""
        networks = f" of {len(self.loss):,} networks" if np.ndim(self.loss) else ""
        steps = {"steps": f"{np.sum(self.num_steps):,}"}
        numbers = self.status, self.loss, self.num_evaluations
        return summary(f"gradient descent{networks}", *numbers, details=steps, notes=self.notes)


def report(
    walked: Walked, unstopped: Status, settled: tuple[Any, Any, Any], seen: Seen, validates: bool
) -> GradientDescentResult:
    """What to return, of one network or of several: surplus networks at the end are left out.

    Args:
        walked: how far the descent came.
        unstopped: the status of a network that no rule has stopped.
        settled: params, losses and verdicts, as of `settle`.
        seen: rows that the steps of an epoch see.
        validates: whether there is a validation batch.

    Returns:
        A `GradientDescentResult`.
    """
    params, loss, verdict = settled
    loss, verdict = np.asarray(loss), np.asarray(verdict)
    here = np.s_[..., : len(verdict)] if verdict.ndim else ...
    kept, num_steps = walked.kept, walked.num_steps[here]
    has_finite = np.isfinite(loss) | np.isfinite(walked.lowest[here])
    endings = "diverged", "converged", "reached"
    result = GradientDescentResult(
        params=jax.tree.map(jnp.asarray, params),
        loss=np.where(np.isfinite(loss), loss, np.inf).astype(np.float64),
        num_evaluations=1 - (-_work(seen, num_steps) // seen.rows),
        num_steps=num_steps,
        status=np.select(
            [
                (verdict == DIVERGED) & ~has_finite,
                *(verdict == ending for ending in (DIVERGED, CONVERGED, REACHED)),
            ],
            ["nonfinite", *endings],
            unstopped,
        ),
        history=DescentHistory(
            _work(seen, kept.step + 1) / seen.rows,
            np.ascontiguousarray(kept.loss[here].T),
            np.ascontiguousarray(kept.validation[here].T) if validates else None,
            _work(seen, (kept.epoch + 1) * len(seen.rows_of_steps)) / seen.rows
            if validates
            else None,
        ),
    )
    return result if verdict.ndim else _of_one(result)


def _work(seen: Seen, num_steps: np.ndarray) -> np.ndarray:
    """Count the work of a number of steps in losses of one row, int64."""
    rows = np.append(0, np.cumsum(seen.rows_of_steps, dtype=np.int64))
    epochs, steps = np.divmod(num_steps, len(seen.rows_of_steps))
    return EVALUATIONS_PER_GRADIENT * (epochs * rows[-1] + rows[steps])


def constant_loss_of(value_and_grad_fn: Any, batch: Any) -> float | None:
    """The loss of the best constant answer on the batch, where the function can tell it."""
    loss = traits_of(value_and_grad_fn).constant_loss(batch)
    return None if loss is None else float(loss)


def notes_on(
    result: GradientDescentResult, start: Any, constant_loss: float | None
) -> tuple[str, ...]:
    """What a status leaves out: that a descent did not move, or learnt no more than a constant."""
    loss, has_stepped = np.asarray(result.loss), np.asarray(result.num_steps) > 0
    is_still = has_stepped & ~np.isin(result.status, ["diverged", "nonfinite", "reached"])
    for leaf, first in zip(jax.tree.leaves(result.params), jax.tree.leaves(start), strict=True):
        axes = tuple(range(loss.ndim, np.ndim(leaf)))
        is_still &= np.all(np.asarray(leaf) == np.asarray(first), axis=axes)
    notes = _note(is_still, "no step changed the params (is the gradient 0, as of a dead network?)")
    if constant_loss:
        limit = constant_loss - CONSTANT_MARGIN * abs(constant_loss)
        is_constant = has_stepped & np.isfinite(loss) & (loss >= limit)
        notes += _note(
            is_constant, f"no better than the best constant answer, of loss {constant_loss:.6g}"
        )
    return notes


def _note(concerns: np.ndarray, text: str) -> tuple[str, ...]:
    """The note, with the number of networks that it concerns where there are several."""
    if not np.any(concerns):
        return ()
    return (f"{np.sum(concerns):,} networks: {text}" if np.ndim(concerns) else text,)


def _of_one(result: GradientDescentResult) -> GradientDescentResult:
    """The numbers of a single network as plain ones."""
    return result._replace(
        loss=float(result.loss),
        num_evaluations=int(result.num_evaluations),
        num_steps=int(result.num_steps),
        status=str(result.status),
    )
