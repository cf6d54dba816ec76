"""Calls of a trainer: interrupted, timed without compilation, printed by improvement."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxnn
from shared.problems import score_of


def finished(result: Any) -> Any:
    """Return a trainer's result, but raise KeyboardInterrupt if Ctrl-C cut the run short."""
    if np.any(np.asarray(result.status) == "interrupted"):
        raise KeyboardInterrupt
    return result


def timed(train: Callable[..., Any], amount: str, number: int, **options: Any) -> tuple[Any, float]:
    """Return the result of `train(amount=number, **options)` and its seconds.

    A first call with an amount of 1 compiles, so that the seconds leave compilation out.
    """
    finished(train(**{amount: 1}))
    started = time.perf_counter()
    result = train(**{amount: number}, **options)
    return result, time.perf_counter() - started


def done_before(checkpoint: Path | None) -> int:
    """Return the candidates, steps or epochs that a checkpoint holds; 0 if there is none yet."""
    if checkpoint is None or not checkpoint.exists():
        return 0
    return jaxnn.saved_progress(checkpoint).done


def candidate_improvements(
    found: Any, key: jax.Array, sample_fn: Any, model: jaxnn.Model, batch: jaxnn.Batch
) -> Iterator[str]:
    """Yield the book's line at each improvement of a random search."""
    score, metric_fn = score_of(model)
    for candidate, loss in zip(found.history.candidate, found.history.loss, strict=True):
        params = jaxnn.candidate_params(key, sample_fn, int(candidate))
        yield line(int(candidate), loss, metric_fn(params, batch), score)


def step_improvements(
    climbed: Any, num_proposals: int = 1, score: str = "accuracy"
) -> Iterator[str]:
    """Yield a line at each improvement of a perturbation search's first chain.

    With `metric_fn=model.accuracy` a line has the accuracy, or another score, unless a long
    history leaves the step out.
    """
    history, (chain, steps, losses) = climbed.history, climbed.accepted_steps
    steps, losses = steps[chain == 0], losses[chain == 0]
    lower = losses < np.minimum.accumulate(np.append(np.inf, losses))[:-1]
    accuracies = {}
    if history.proposed_metric is not None:
        recorded = (history.evaluations - 1) // num_proposals - 1
        metric = np.atleast_2d(history.proposed_metric)[0]
        accuracies = dict(zip(recorded.tolist(), metric, strict=True))
    for step, loss in zip(steps[lower].tolist(), losses[lower], strict=True):
        yield line(step, loss, accuracies.get(step), score)


def line(iteration: int, loss: Any, metric: Any, score: str) -> str:
    """Return the line that the book prints at an improvement."""
    measured = "" if metric is None else f"  {score} {float(metric):.3f}"
    return f"iteration {iteration:>13,}  loss {loss:.6f}{measured}"
