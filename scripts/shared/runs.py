"""Calls of a trainer: interrupted, timed without compilation, printed by improvement."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import jaxnn


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


def improvement_lines(result: Any, score: str = "accuracy") -> Iterator[str]:
    """Yield a line for each improvement; `score` is the name of what `metric_fn` returned."""
    for evaluations, loss, metric in result.improvements():
        measured = "" if metric is None else f"  {score} {metric:.3f}"
        yield f"evaluations {evaluations:>13,}  loss {loss:.6f}{measured}"
